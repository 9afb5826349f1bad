"""Who somebody is and how to reach them: replaced by what it was, in the text rules contacts and names."""

import re

from medtune.data.cleaning.boilerplate import REMOVED, Changed, close_gaps, either, mentions

MAIL = re.compile(r"(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)*\.[a-zA-Z]{2,}")
MONTH = "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}"
DATE = (
    r"(?:\d\d?[/.-]\d\d?[/.-]\d{2,4}|\d{4}[/-]\d\d?[/-]\d\d?|\d\d?(?:st|nd|rd|th)? (?:of )?"
    rf"{MONTH}\.?,? \d{{4}}|{MONTH}\.? \d\d?(?:st|nd|rd|th)?,? \d{{4}})(?![\d/-])"
)
BIRTH = re.compile(rf"\b(?:(born on )|(?:dob|(?:date of birth|birth ?date)(?: is)?)[ :=-]{{0,3}}){DATE}", re.I)
IDENTITY = re.compile(
    r"\b(?:mrn|ssn|uhid|(?:record|security|patient|hospital|insurance|passport|aadhaa?r|nhs) ?(?:id|no\.?|number|#))"
    r"(?: (?:no\.?|number|is))*[ :#=.-]{0,3}[a-z]{0,3}-?\d(?:[ -]?\d){3,15}(?![\w/%])"
    r"|(?<![\d-])\d{3}-\d\d-\d{4}(?![\d-])", re.I
)  # fmt: skip
CALL = either("call (?:tele|cell_?)?phone tel mobile whats_?app fax tty toll[_-]free (?:my|contact)_number")
PHONE = re.compile(
    r"(?<![\w+])\+\d(?:[ .()-]{0,2}\d){8,14}(?!\w)"  # international
    r"|(?<![\w.,/+-])(?:(?:1[ .-]?)?(?:\([2-9]\d\d\) ?\d{3}[ .-]|[2-9]\d\d(?P<by>[.-])\d{3}(?P=by))\d{4}"  # American
    r"|[6-9](?!\d{4}0{5})\d{9})(?![\w/%-]|[.,]\d| (?:x\b|cells?|copies|i?u\b|units?|million|per\b))"  # Indian
    rf"|\b(?P<lead>{CALL}(?: (?:me|us|him|her|them))?(?: (?:at|on|no\.?|number|is))*[ .:]{{1,2}})(?!{DATE})"
    r"[+(]?\d(?:[-. ()]{0,2}\d){6,14}(?![\w/%])",
    re.I,
)
# What must be somewhere, so that one matches.
MARKED = "mrn", "ssn", "uhid", "record", "security", "patient", "hospital", "insurance", "passport", "aadha", "nhs"
FIGURES = bytes(48 if 48 <= b < 58 or b > 127 else 120 for b in range(256))  # 0 for what may be a digit, x else
MANY = re.compile(r"\d(?:[-./() ]{0,2}\d){4}")


def contacts(text: str, role: str) -> Changed:
    """Returns text with [email], [phone], [id] and [date of birth] for what tells who somebody is or how to reach
    them.
    """
    places = 0
    if "@" in text:
        text, places = MAIL.subn("[email]", text)
    figures = text.encode(errors="replace").translate(FIGURES, b"-./() ")  # several times as fast as a pattern
    if b"0000" not in figures:
        return text, places
    lower = text.lower()
    if mentions(lower, "born on", "birth", "dob"):
        text, births = BIRTH.subn(r"\1[date of birth]", text)
        places += births
    if b"00000" in figures and (b"0" * 9 in figures or mentions(lower, *MARKED)) and MANY.search(text):
        text, identities = IDENTITY.subn("[id]", text)
        places += identities
    if b"0" * 7 in figures:
        text, phones = PHONE.subn(r"\g<lead>[phone]", text)
        places += phones
    return text, places


# A word of a name; words that begin a sentence after "see your Dr." and makers of products are none.
OTHER = either("""
    The This That These It He She They We You I My His Her Your Our If But And So Then When What Why How Is Are Was Do
    Does Did Can Could Would Should Will Has Have Had No Not Yes Please Also After Before For From In On At As To There
    Now Today Next Said Told Take Get Drink Avoid Hope Thanks? Regards Any All An? [MTWFS][a-z]+day Who Best
    Scholl Pepper Google Martens Reddy Reckeweg Bronner Batra
""")
WORD = rf"(?!{OTHER}\b)[A-ZÀ-Þ](?=\w|['\u2019])[a-zß-ÿ]*(?:['\u2019-]?[A-ZÀ-Þ][a-zß-ÿ]+)*+(?![\wÀ-ÿ])"
NAME = rf"(?:[A-Z]\.? )*{WORD}(?: (?:[A-Z]\. )?{WORD}(?! ?\d)){{0,2}}"
DEGREE = r"(?:[,\s]\s?(?:M\.?D|M\.?B\.?B\.?S|D\.?O|Ph\.?D|FRC[SP]|MRCP|MS|DNB|DM|FAC[CP]|FAAP|MCh|[BM]DS)(?!\w)\.?)*"
TITLED = re.compile(rf"(?P<lead>,? ?)\b(?:[Dd]r|DR(?=\.))(?P<dot>\.?)(?:(?<=\.)| ) ?{NAME}{DEGREE}(?P<trail>,?)")
CLOSING = either("""
    (?:(?:best|kind|warm)_)*regards thanks_(?:and|&)_regards sincerely yours_(?:sincerely|truly|faithfully) best_wishes
    (?:with_)?thanks thank_you cheers take_care
""")
SIGNED = re.compile(
    rf"(?:(?:^|(?<=[.!?…,;\s]))(?i:{CLOSING}[,.!:\s-]{{1,4}})"
    # without a title only at the very end, and not after "thanks. "
    rf"(?:(?i:dr)(?:\. ?| ){NAME}|(?<!are[,.] )(?<!nks[,.] )(?<!you[,.] ){NAME}(?=[\s.]*\Z))"
    rf"|(?:(?<=[.!?…] )|^)Dr(?:\. ?| ){NAME}){DEGREE}\.?(?:[,\s]+(?:Consultant|General|Family) [A-Z]\w+)?\.? *$",
    re.M,
)
SIGNS = "dr.", "dr ", "regards", "sincerely", "yours", "best wishes", "thank", "cheers", "take care"
GREETED = re.compile(r"\b(?:hi|hello|hey|dear|thanks?|thank you|good (?:day|morning|afternoon|evening))$", re.I)
OWNED = re.compile(r"\b(?:an?|the|this|that|my|your|his|her|our|their)$", re.I)
NAMED = re.compile(
    r"\b(?:my|his|her|our|their|the|an?) (?:[\w-]+ ){0,2}"
    r"(?:\w+(?:olog|iatr|oped)ist|\w+ician|doctor|surgeon|gp|dentist|consultant|specialist)$",
    re.I,
)


def names(text: str, role: str) -> Changed:
    """Returns text without signatures, and with "the doctor" for a doctor's name."""
    if not mentions(text, "Dr", "DR.", "egards", "incerely") or not mentions(text.lower(), *SIGNS):
        return text, 0
    text, places = SIGNED.subn(REMOVED, text)

    def role_of(found: re.Match[str]) -> str:
        nonlocal places
        before = found.string[max(0, found.start() - 60) : found.start()]
        if found["dot"] and OWNED.search(before):  # "ask your Dr. Ibuprofen helps"
            return found[0]
        places += 1
        apposed = found["lead"].startswith(",")
        if NAMED.search(before):
            return "" if apposed else found["trail"]
        article = "" if GREETED.search(before) or OWNED.search(before) else "the "
        if article and not apposed and before.rstrip(" ")[-1:] in ("", ".", "!", "?", "\n"):
            article = "The "
        return f"{found['lead']}{article}doctor{found['trail']}"

    return TITLED.sub(role_of, close_gaps(text)), places
