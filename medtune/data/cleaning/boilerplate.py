"""Sentences that a site puts into every answer: links and pointers to more answers, politeness, advertising.

Patterns see one sentence at a time, and a sentence goes only as a whole: "Take care of the wound." stays.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

Changed = tuple[str, int]  # the text after a rule, and how many places the rule changed
REMOVED = "\0"  # stands where a rule took something out, until `close`
LONGEST = 250  # characters of a sentence that may be boilerplate: bounds the work of its pattern

END = re.compile(r"[.!?…\n](?:(?<=\n)|(?=\s|\Z)(?!\s?[Cc]om\b))")  # "icliniq. com" goes on
LEADING = re.compile(r"(?:[,;:!…? ]|\.(?!\d))+")


def either(words: str) -> str:
    """Returns a pattern for one of these words (patterns themselves); _ stands for the space within one."""
    return "(?:" + "|".join(words.split()).replace("_", " ") + ")"


def mentions(text: str, *words: str) -> bool:
    """Returns whether one of the words is in the text: what is cheap to ask before a costly pattern."""
    for word in words:  # noqa: SIM110 (any() with a generator takes three times as long)
        if word in text:
            return True
    return False


def close_gaps(text: str) -> str:
    """Returns text with its holes closed: no comma left at a start, no doubled stop or space, no empty brackets."""
    if REMOVED not in text:
        return text
    first, *others = text.split(REMOVED)
    kept = [first.rstrip(" ")]
    for part in others:
        part, left = part.strip(" "), kept[-1][-1:]
        if left == "(" and part[:1] == ")":
            kept[-1], part = kept[-1][:-1].rstrip(" "), part[1:].lstrip(" ")
            left = kept[-1][-1:]
        if not left or left in ".!?…\n":
            if leading := LEADING.match(part):
                part = part[leading.end() :]
        elif left in ",;:" and part[:1] in (",", ".", ";", "!", "?"):
            kept[-1] = kept[-1][:-1]
        if part:
            kept.append(part if not left or left in "\n(" or part[0] in "\n,.;:!?)" else " " + part)
    return "".join(kept)


def drop_sentences(text: str, unwanted: Callable[[str], object]) -> Changed:
    """Returns text without its unwanted sentences; `unwanted` sees them in lower case."""
    kept, taken, start, places = [], 0, 0, 0
    for end in [*map(re.Match.end, END.finditer(text)), len(text)]:
        if 2 < end - start < LONGEST and unwanted(text[start:end].strip().lower()):
            kept += [text[taken:start], REMOVED, "\n" if text[end - 1] == "\n" else ""]
            taken, places = end, places + 1
        start = end
    return (close_gaps("".join([*kept, text[taken:]])), places) if places else (text, 0)


# Links, and sentences like "for more information consult a urologist online" or "visit this link: …".

DOCTOR = "an? [a-z][a-z /,-]{2,60}?"
FURTHER = "for (?:any )?(?:further|more|other|additional) " + either(
    "information info details doubts? query queries questions? clarifications? follow[_-]?up help assistance advice"
    " guidance"
)
WITH = either("more further the an? all your above these details? detailed information history answers? to questions")
VISIT = either("visit see go_to click click_on check check_out read_more source reference website link")
PLACE = either("the this our us at following website site page link here online")
POINTERS = (
    rf"{FURTHER},? (?:please |kindly )?(?:consult|contact|ask|revert(?: back)? to) {DOCTOR} online",
    rf"(?:please )?consult {DOCTOR} online {FURTHER}",
    rf"revert(?: back)?(?: with(?: {WITH}\b)++)?",
    rf"(?:{FURTHER},? )?(?:please )?{VISIT}(?: {PLACE})*:?(?: ?{REMOVED})++(?: {FURTHER})?",
)
POINTER = re.compile(rf"(?:regarding follow[ -]?up ?: ?)?(?:{'|'.join(POINTERS)})[.!]?(?: ?{REMOVED})?")
WARNING = re.compile(r"\d|\b(?:urgent|immediate|emergency|(?:asap|today|now|not?|if|within)\b)")
ARROW = re.compile(r"-(?:-{1,8}>)(?:\s?<link\b[^<>]*>|(?=\s*(?:\n|\Z)))|<link\b[^<>]*>", re.I)
REFERRED = re.compile(rf" (?:back )?to (?:consult )?{DOCTOR} online(?: {FURTHER})?\.?\s?{REMOVED}", re.I)
URL = re.compile(rf"(?:(?<!\w)https?://|(?<![\w/.])www\.)(?=\w)[^\s<>\"{REMOVED}]*[^\s<>\".,;:!?)\]'{REMOVED}]", re.I)
LED = re.compile(rf"(?: (?:(?:and|or) )?(?:visit|see|at|on|via|from))? ?[(\[]?{REMOVED}[)\]]?", re.I)


def pointer(sentence: str) -> bool:
    """Returns whether a sentence only points elsewhere, and warns of nothing."""
    possible = mentions(sentence, "online", "revert", REMOVED) and POINTER.fullmatch(sentence)
    return bool(possible) and not WARNING.search(sentence)


def links(text: str, role: str) -> Changed:
    """Returns text without addresses and arrows to them, and without sentences that only point there."""
    lower = text.lower()
    pointing = role == "assistant" and mentions(lower, "online", "revert")
    if not pointing and not mentions(lower, REMOVED, ">", "http", "www."):
        return text, 0
    arrows = addresses = found = 0
    if mentions(lower, "->", "<link"):
        text, arrows = ARROW.subn(REMOVED, text)
        if arrows and mentions(lower, " to a ", " to an ", " to consult a"):
            text = REFERRED.sub(REMOVED, text)
    if mentions(lower, "http", "www."):
        text, addresses = URL.subn(REMOVED, text)
    if addresses or pointing or (arrows and role == "assistant"):
        text, found = drop_sentences(text, pointer)
    return close_gaps(LED.sub(REMOVED, text) if addresses else text), max(arrows + addresses, found)


# Politeness: one phrase after another, with nothing in between, makes a sentence of boilerplate.

GREETING = either("hi+ hello hey dear greetings namaste good_day good_morning good_afternoon good_evening")
READER = either("there dear sir madam friend user patient doctor doc again")
# What thanks and hopes are about. No word that could carry a finding, a dose or an order.
ABOUT = r"(?: {}\b)".format(
    either("""
    your ur you the this that it an? us me we i my to on in at with for of and all any more further other above so very
    much again here will would can could have has had is are was be been do using choosing posting posted asking writing
    contacting consulting sharing trusting query queries questions? doubts? concerns? worry worries clarifications?
    problems? complaints? health medical history details? detailed information info message time patience trust interest
    forum site website reply answer(?:s|ed)? response advice opinion suggestions? help(?:s|ed|ful)? useful assist
    assistance clear(?:s|ed)? clarified resolved satisfied understand understood carefully thoroughly through
    """)
)
WELL = r"(?: {}\b)".format(
    either("""
    you u him her he she them your family and gets? feels? recovers? an? the very good great best all of in health
    healthy happy life luck speedy quick fast soon early recovery well better day for future ahead
    """)
)
SOME = "(?:any|more|further|other|additional)"
MORE = rf"{SOME}(?: {SOME})*+ (?:quer|question|doubt|clarif|concern)\w*+"
ME = "(?:me|us)"
PHRASES = (
    rf"{GREETING}\b(?: {READER}\b)*+",
    r"welcome (?:back )?to (?:us\b|(?:\w+ ){0,3}(?:clinic|hospital))",
    rf"(?:many )?(?:thanks?|thank ?you)\b(?: in advance|{ABOUT}++)?",
    r"i(?: |'ve )(?:have |had |can |do |fully |just )*+(?:(?:gone|went) through|read|reviewed|understand|understood)"
    rf"(?= (?:all )?(?:your|ur|the)\b){ABOUT}++",
    rf"(?:i |we )?(?:do |also )*+hope(?= (?:this|that|it|i|the|my|above|you)\b){ABOUT}++",
    rf"(?:i |we )?(?:do |also )*+(?:hope|wish|wishing)(?= (?:you|u|him|her|he|she|them)\b){WELL}++",
    "(?:get well|feel better) soon|speedy recovery(?: wishes)?|take care(?: of yourself)?|all the best|good luck",
    "best wishes(?: (?:with|for) (?:a )?speedy recovery)?|god bless(?: you)?|cheers",
    "stay (?:healthy|happy|blessed)(?: and (?:healthy|happy|blessed))?",
    "have an? (?:healthy|nice|good|great|lovely|pleasant) day(?: ahead)?",
    # an offer of more answers; "contact me if it gets worse" is medicine
    rf"(?:(?:if you (?:still )?have|in case of|should you have|for) {MORE},? )?(?:please |kindly |you (?:can|may) )*+"
    "(?:feel free to |(?:don'?t|do not) hesitate to )?"
    rf"(?:(?:get|write|revert|reply|contact|ask|let {ME} know)(?: (?:back|to|me|us))*+"
    rf"(?: (?:with|if (?:you (?:still )?have|there are)|in case of|for))? {MORE}"
    rf"|let {ME} know if i can{ABOUT}++|contact {ME}(?: again)?)",
    "(?:i|we)(?: will| would|'ll| shall| am| are)(?: be)?(?: always)? (?:happy|glad|here) to (?:help|assist|answer)"
    rf"{ABOUT}*+",
    r"(?:with )?(?:best |kind |warm )*+regards|sincerely|yours (?:sincerely|truly|faithfully)",
)
PHRASE = f"(?>{'|'.join(PHRASES)})"
BOILERPLATE = re.compile(
    rf"[\s.,…]*+(?:and )?{PHRASE}(?:[\s,;:.!…-]*+(?:and |from )?(?:{PHRASE}|us(?: team)?\b))*+[\s,;:.!…-]*+"
)
POLITE = re.compile(rf"[.!?…\n][\s.,…]{{0,{LONGEST}}}+(?:and )?{PHRASE}")  # what must be somewhere, so that one matches
OPENING = re.compile(rf"(?:hi+|hello|hey|dear)(?: {READER}\b)*+[,.!]\s*", re.I)
ADDRESS = re.compile(
    r"(?:(?i:(?:hi|hello|hey|dear|respected)(?: (?:doctors?|doc|dr|sir|madam|there))*)[,.!]?"
    r"(?:\s*\n\s*|(?<=[,.!])(?=[A-Z])))+(?=\S)"
)
PLEA = re.compile(
    r"(?<=[.!?…\n])\s*(?:(?:many )?(?:thanks|thank you)(?: (?:so|very) much)?(?: in advance)?"
    r"|please help(?: (?:me|us))?(?: out)?)[\s.!]*\Z",
    re.I,
)


def greetings(text: str, role: str) -> Changed:
    """Returns an answer without sentences of mere politeness; a question without a salutation on its own and a last
    plea.
    """
    if role == "user":
        if opening := ADDRESS.match(text):
            text = text[opening.end() :]
        end, closed = text[-LONGEST:], 0
        if mentions(end.lower(), "thank", "please help"):
            end, closed = PLEA.subn("", end)
        return text[:-LONGEST] + end, bool(opening) + closed
    text, places = drop_sentences(text, BOILERPLATE.fullmatch) if POLITE.search("\n" + text.lower()) else (text, 0)
    if opening := OPENING.match(text):
        rest = text[opening.end() :]
        text, places = (rest[:1].upper() + rest[1:] if text[0].isupper() else rest), places + 1
    return text, places


# Products: the names of the site and its brands, which the configuration of a source lists.


def products(text: str, role: str, brand: re.Pattern[str], sure: re.Pattern[str], hints: tuple[str, ...]) -> Changed:
    """Returns text without sentences that only advertise a brand, and without the names that are surely brands."""
    if not mentions(text.lower(), *hints):
        return text, 0
    text, sentences = drop_sentences(text, lambda s: brand.search(s) and BOILERPLATE.fullmatch(brand.sub("us", s)))
    text, places = sure.subn(REMOVED, text)
    return close_gaps(text), sentences + places


def branded(names: Sequence[str]) -> Callable[[str, str], Changed]:
    """Returns the rule products for these names.

    Apart from boilerplate a name must be sure to be one: HCM is a disease, too, and "ask a doctor" is advice, so short
    ones in capitals never go and those of several words only as they are spelled here.
    """
    brands = sorted(filter(None, map(str.strip, names)), key=len, reverse=True)
    spelled = {b: "[ ]?".join(map(re.escape, b.split())) for b in brands}
    exact = {b: f"(?-i:{spelled[b]})" if " " in b else spelled[b] for b in brands if len(b) > 4 or not b.isupper()}
    known, sure = (
        rf"(?<!\w)(?:www\.)?(?:{'|'.join(some.values()) or '(?!)'})(?:'s)?(?: team)?(?:\s?\.\s?com\b)?(?!\w)"
        for some in (spelled, exact)
    )
    leading = "(?: (?:on|at|from|with|via|through|to|in|by))?[ ]?"
    hints = {spelling.lower() for b in brands for spelling in (b, b.replace(" ", ""))}
    hints = {h for h in hints if not mentions(h, *(hints - {h}))}
    return partial(products, brand=re.compile(known, re.I), sure=re.compile(leading + sure, re.I), hints=tuple(hints))
