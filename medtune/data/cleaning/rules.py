"""Text rules that take out of real question-and-answer sets what is no medicine: residue, boilerplate, identities.

A rule would rather miss a place than change what a message says: no dose, number, negation or warning may be lost.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import unescape
from html.entities import html5
from typing import Any

import ftfy

from medtune.data.cleaning.boilerplate import Changed, branded, either, greetings, links, mentions, products
from medtune.data.cleaning.language import is_english
from medtune.data.cleaning.pii import contacts, names
from medtune.data.reading.turns import Messages

VERSION = 1  # raise it when a rule changes what it does
PASSES = 8  # real texts settle in two or three

# UTF-8 read as Latin-1 or Windows-1252, and Windows-1252 read as Latin-1.
MISREAD = re.compile("Ã |[Â-ô][\x80-¿ŒœŠšŸŽžƒˆ\u02dc\u2013-™]+|[\x80-\x9f]+")


def mojibake(text: str, role: str) -> Changed:
    """Returns text that was decoded wrongly, repaired; curled quotes, µ, °, é, emoji and lone replacement characters
    stay.
    """
    places = 0 if text.isascii() else len(MISREAD.findall(text))
    return (ftfy.fix_encoding(text) if places else text), places


INLINE = either("a abbr b big code del em font i img ins small span strike strong sub sup")
BLOCK = either(
    "blockquote body br center d[dlt] div form h[1-6] head hr html li ol p pre table t[dhr] tbody thead u ul"
)
ATTRIBUTE = r"""\s++[\w:-]++\s*+=\s*+(?:"[^"<>]*+"|'[^'<>]*+'|[^\s"'<>]++)"""
TAG = re.compile(rf"<!--[^<>]*+-->|</?(?:{INLINE}|(?P<block>{BLOCK}))(?:{ATTRIBUTE})*+\s*+/?>", re.I)
POWER = re.compile(r"[+\d-]")
ENTITY = re.compile(r"&(?:(?:amp|#0*38|#x0*26);)*(#\d{1,7}|#[xX][\da-fA-F]{1,6}|[a-zA-Z][\da-zA-Z]{1,30});")
BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]+"
    # joiners have work to do after an emoji or a letter of a script that joins
    "|(?<![\u0600-\u1fff\u2190-\ufefe\U00010000-\U0010ffff])[\u200c\u200d]+"
)
BLANK = re.compile("[\t\xa0\u2000-\u200a\u202f\u205f]+")
SPACE = re.compile(r"(?<= ) +| (?=\n)|(?<=\n\n)\n+")


def markup(text: str, role: str) -> Changed:
    """Returns text without HTML tags, entities, invisible characters and needless space."""
    places = 0
    if "&" in text:
        text, places = ENTITY.subn(lambda m: unescape(m[0]) if m[1][0] == "#" else html5.get(m[1] + ";", m[0]), text)
    if "<" in text:
        text, tags = TAG.subn(tag, text)
        places += tags
    if not text.replace("\n", " ").isprintable():
        for pattern, to in (BREAK, "\n"), (INVISIBLE, ""), (BLANK, " "):
            text, found = pattern.subn(to, text)
            places += found
    if "  " in text or ("\n" in text and mentions(text, " \n", "\n\n\n")):
        text, found = SPACE.subn("", text)
        places += found
    stripped = text.strip()
    return stripped, places + (stripped != text)


def tag(found: re.Match[str]) -> str:
    """Returns what stands for a tag: a line break for a block's, and a power keeps its ^, because 10^9 is not 109."""
    whole, name = found[0].lower(), (found["block"] or "").lower()
    if not name:
        return "^" if whole.startswith("<sup") and POWER.match(found.string, found.end()) else ""
    return " " if name in ("td", "th") else "\n- " if whole == "<li>" else "\n"


APART = re.compile(r"\. {1,3}\d")
UNIT = either(
    "[mnkuµμ]?g mcg gms? grams? kgs? ml lit(?:er|re)s? dl m?i?u units? mmol meq mm_?hg [cm]m inch(?:es)? degrees? [fc]"
    " million lakhs? x_?10"
)
BROKEN = re.compile(rf"(?<![\w.,])(\d{{1,3}})\. {{1,3}}(\d{{1,3}})(?= ?(?:{UNIT}\b|[°\xd7%]))(?!\.\d)", re.I)
ITEM = re.compile(r"(?<!\S)(\d{1,3})\. ")
# What stands before a number that counts, or that ends its sentence.
COUNTED = re.compile(
    r"(?:^|[^a-z<>=~(]|\b(?:type|stage|grade|step|day|week|month|phase|class|group|number|no|point|option|part|aged?"
    r"|every|covid|vitamin|in|following|plan|treatment|advice|rx|tests?|medicines?|medications?|cycle|para|gravida))$"
)
SUBJECT = re.compile(
    r" ?\S{1,9} (?:is|was|are|were|should|can|may|will|would)\b", re.I
)  # "5 mg is too much" begins anew


def decimals(text: str, role: str) -> Changed:
    """Returns text with the space taken out of "0. 5 mg", where that is surely no numbered list and no end of a
    sentence.
    """
    if not APART.search(text):
        return text, 0
    items = set(map(int, ITEM.findall(text)))  # a neighbour shows that a number counts a list
    places = 0

    def joined(found: re.Match[str]) -> str:
        nonlocal places
        whole, before = found[1], text[max(0, found.start() - 40) : found.start()].lower().rstrip(" ")
        listed = whole != "0" and (
            items & {int(whole) - 1 or -1, int(whole) + 1} or COUNTED.search(before) or SUBJECT.match(text, found.end())
        )
        if listed:
            return found[0]
        places += 1
        return f"{whole}.{found[2]}"

    return BROKEN.sub(joined, text), places


CAPITAL = re.compile("[A-Z]")
CASED = re.compile(r"[.!?]\s+[A-Z]")
LISTED = r"(?:[-*•] |\d\d?[.)] )?"
# A stop after these ends no sentence; these stay small; these are all capitals.
SHORT = "mg ml dr mr vs no st al", "mrs etc tab cap inj min hrs", "approx", r"\w"  # alike in length, to look behind
SMALL = "ph com mg ml mcg mrna"
ACRONYMS = """
    acl adhd bmi bp cbc copd cpr crp ct dna dvt ecg eeg ekg emg ent esr gerd gi gp hcg hiv hpv hrt hsv ibd ibs icu iud
    iui iv ivf lft mri nsaid ocd pcod pcos pet psa ptsd rbc std sti tb tia tmj tsh usg uti wbc
"""
CASES = {w: w for w in SMALL.split()} | {w + s: w.upper() + s for w in ACRONYMS.split() for s in ("", "s")}
# Groups: stop and space; not None after a SHORT, where no sentence starts; else the first word.
UNENDED = "|".join(rf"(?<=[ .(]{either(words)}[.!?…])" for words in SHORT)
START = re.compile(
    rf"([.!?…\n](?:(?<=\n)|((?i:{UNENDED}))?\s)\s{{0,3}}+{LISTED})"
    r"(?=[a-z])(?(2)|([a-z]++))(?=['\u2019a-z-]*+(?:[\s,.;:!?]|\Z))"
)
BEGINNING = 500  # characters, by which the language is told
WORD = re.compile(r"\w+(?:['\u2019]\w+)?")
PRONOUN = re.compile(r"i(?<=[\s(\[\"\u201c\u2018,;:]i)(?=['\u2019](?:m|ve|ll|d)\b| (?!\w\b|\d))")


def recase(text: str, role: str) -> Changed:
    """Returns an answer written without capitals, with them at the starts of sentences, in acronyms there, and
    in "I".
    """
    if role == "user" or text[:1].isupper():
        return text, 0
    if not text.islower() and (len(CAPITAL.findall(text)) * 50 > len(text) or CASED.search(text)):
        return text, 0
    parts = START.split("\n" + text)
    parts[3::4] = [word and (CASES.get(word) or word.capitalize()) for word in parts[3::4]]
    text, pronouns = "".join(filter(None, parts))[1:], 0
    if PRONOUN.search(text) and is_english(WORD.findall(text[:BEGINNING].lower())):  # "i" is "and" in Italian
        text, pronouns = PRONOUN.subn("I", text)
    return text, len(parts) // 4 + pronouns


RULES: dict[str, Callable[..., Changed]] = {
    rule.__name__: rule for rule in (mojibake, markup, links, contacts, decimals, names, products, greetings, recase)
}
TEXT_RULES: tuple[str, ...] = tuple(RULES)
CASELESS = {"markup", "links", "contacts", "decimals", "greetings"}  # capitals that recase sets are no work for them


class Cleaner:
    """Applies the text rules that are switched on, in a fixed order."""

    def __init__(self, rules: Mapping[str, Any], product_names: Sequence[str]) -> None:
        """`rules` maps each of `TEXT_RULES` to whether it is on; `product_names` are the brands of rule products."""
        known = RULES | {"products": branded(product_names)}
        self.rules = [(name, known[name]) for name in TEXT_RULES if rules[name]]
        self.system = [rule for rule in self.rules if rule[0] in ("mojibake", "markup")]  # its words stay
        self.settled = ""  # the last system message that needed nothing: mostly all are the same
        self.cased = [rule for rule in self.rules if rule[0] not in CASELESS]

    def __call__(self, messages: Messages) -> tuple[Messages, dict[str, int]]:
        """Returns the cleaned messages (same roles, contents possibly empty) and how many places each rule changed."""
        places: Counter[str] = Counter()
        return [m | {"content": self.cleaned(m["content"], m["role"], places)} for m in messages], dict(places)

    def cleaned(self, text: str, role: str, places: Counter[str]) -> str:
        """Returns the text after as many passes as it takes to settle, so that cleaning it again changes nothing.

        A text that does not settle was made to hurt, and nothing is left of it.
        """
        if role == "system" and text == self.settled:
            return text
        rules = every = self.system if role == "system" else self.rules
        for _ in range(PASSES):
            changing = []
            for name, rule in rules:
                changed, found = rule(text, role)
                if changed != text:
                    places[name] += max(found, 1)
                    text = changed
                    changing.append(name)
            if not changing:
                if role == "system":
                    self.settled = text
                return text
            rules = self.cased if changing == ["recase"] else every
        return ""
