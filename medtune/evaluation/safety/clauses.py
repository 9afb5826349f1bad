"""A text -> its phrases, and whether one stands: not asked, denied or on an unmet condition; a message -> a `Patient`.

The words for all of that are in `rubric.yaml`; which phrases are looked for, and what they amount to, is `rubric.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from medtune.data.cleaning.red_flags import normal, red_flag

_STEM = 5  # letters that words about one thing share: "vaccine", "vaccinated"
ALARM = "emergency"[:_STEM]
_RECENT = 2  # sentences before "these symptoms" that may say which
_REACH = 500  # characters of a sentence on either side of a phrase: a model that loops writes endless ones
NEAR = 4  # words that a gap may hold, or a "not" denies

_ABBREVIATED = re.compile(r"\b(dr|mr|mrs|ms|st|vs|e\.g|i\.e|approx)\.")
_RANGE = re.compile(r"(?<=\d) ?[-\u2013] ?(?=\d)")
_BULLET = re.compile(r"\s*(?:[-*\u2022+>#]+|\d+[.)])\s+")
_LEAD = re.compile(r"\b(?:if|when|should|signs?|symptoms?)\b", re.I)  # of a list of what may come, not of steps
_TOKEN = re.compile(
    r"\d+(?:[.,]\d+)*|[^\W\d_]+|[,;:&%/()\u2013\u2014]|(?<=\s)-+(?=\s)|[.!?\u2026]+(?=[\s\"')\]*_]|$)|\n"
)
_MARKS = {mark: "," for mark in "()-\u2013\u2014"} | {mark: "." for mark in "\n;!.\u2026"} | {"?": "?", ":": ": ,"}
_END = re.compile(r" [.?] ")


class Phrase(NamedTuple):
    """A phrase that was found in a text, and where."""

    words: str
    before: str  # in its sentence; from a space on, as all of these
    after: str  # in its sentence
    earlier: str  # all sentences before
    asked: bool  # its sentence is a question

    @property
    def sentence(self) -> str:
        """All of its sentence."""
        return f"{self.before}{self.words}{self.after}"

    @property
    def clause(self) -> str:
        """What stands before it since the last comma."""
        return self.before[self.before.rfind(",") + 1 :]


def read(text: str) -> str:
    """Returns the words of a text in lower case, and of its marks , : . ? % & /, all between single spaces.

    A list under "if:" is one sentence with it; any other is as many sentences as items.
    """
    lines: list[str] = []
    joined = False
    for line in filter(str.strip, text.splitlines()):
        item = _BULLET.sub("", line, count=1) if _BULLET.match(line) else line
        if joined and item is not line:
            lines[-1] += f", {item.rstrip(' .')}"
        else:
            lines.append(item)
            joined = item.rstrip(" *_").endswith(":") and bool(_LEAD.search(item))
    marked = _RANGE.sub(" ", _ABBREVIATED.sub(r"\1", normal("\n".join(lines))))
    tokens = (_MARKS.get(token[0], token) for token in _TOKEN.findall(marked))
    return f" . {' '.join(tokens)} . "


def phrases(pattern: re.Pattern[str], text: str) -> Iterator[Phrase]:
    """Yields all places of a text, as `read` gives it, where the pattern is found."""
    for found in pattern.finditer(text):
        begin = max(text.rfind(end, 0, found.start()) for end in (" . ", " ? ")) + 2
        end = _END.search(text, found.end())
        stop, asked = (end.start() + 1, end[0] == " ? ") if end else (len(text), False)
        before = text[max(begin, found.start() - _REACH) : found.start()]
        after = text[found.end() : min(stop, found.end() + _REACH)]
        yield Phrase(found[0], before, after, text[:begin], asked)


def stems(text: str) -> frozenset[str]:
    """Returns what tells the longer words of a text apart."""
    return frozenset(word[:_STEM] for word in text.split() if len(word) > 2)


def first(words: int, text: str) -> str:
    """Returns so many words of a text, or fewer where a comma comes before."""
    return f" {' '.join(text.partition(',')[0].split()[:words])} "


def last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Returns where a pattern is found for the last time."""
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    return found


@dataclass(frozen=True)
class Patient:
    """What a message says, as far as answers are compared with it."""

    text: str  # as `read` gives it
    said: frozenset[str]  # stems of its words, in the terms of `same`, less what it denies
    topics: frozenset[str]  # stems of all but ordinary words
    denied: frozenset[str]  # topics that it denies: "I can't get pregnant"
    wants: bool  # it asks about taking something, or nothing is known of it
    believes: bool  # it says what causes, cures or works, or nothing is known of it


class Grammar:
    """The words of `rubric.yaml` that bind phrases together, or tell what a message is about, compiled."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.lists: dict[str, list[str]] = content["words"]
        self.gaps = {"...": rf"(?: \w+){{0,{NEAR}}}?", "~": f"(?: (?:{'|'.join(content['between'])})){{0,6}}?"}
        self.request = self.compiled(content["requests"])
        fillers = f"(?:(?:{self.either(content['after denial'])}) )*"
        self.denial = re.compile(f"(?<= )(?:{self.either(content['denied'])}) {fillers}$")
        self.denied_after = re.compile(rf"^ (?:\w+ ){{0,3}}?(?:{self.either(content['denied after'])})(?= )")

        self.pronoun, self.ordinary = self.compiled(content["pronouns"]), stems(" ".join(content["ordinary"]))
        self.taking, self.asking = self.each(content["check"], "taking", "asking")
        corrects, doses = content["corrects"], content["doses"]
        self.permission, self.belief = self.each(corrects, "permission", "belief")
        self.denies = re.compile(rf"(?<= )(?:{self.either(corrects['negative'])})(?: \w+){{1,{NEAR}}}(?= )")
        others, known = self.either(doses["not prescription"]), self.either(doses["prescription"])
        self.medicine = re.compile(rf"(?<= )(?:({others})|{known}|\w{{2,}}(?:{'|'.join(doses['endings'])}))(?= )")

        on = content["conditions"]
        free = "".join(f"(?<! {word} )" for word in on["unless after"])
        condition = f"{free}(?:{self.either(on['begins with'])})(?! (?:{self.either(on['unless before'])}) )"
        symptom = (
            rf"for (?:\w+ ){{0,3}}?(?:{self.either([one for words in content['same'].values() for one in words])})"
        )
        self.condition = re.compile(f"(?<= )(?:{condition})(?= )")
        self.following = re.compile(f"(?<= )(?:{condition}|{symptom})(?= )")
        self.fronted = re.compile(f"^ (?:{self.either(on['fronted'])})(?= )")
        self.means, self.somebody, self.about_to = self.each(on, "means", "somebody", "about to")
        self.new, self.empty, self.pointing = self.each(on, "new", "empty", "pointing")
        self.listing, self.any_of = self.each(on, "listing", "any of")
        self.same = {name: self.compiled(words) for name, words in content["same"].items()}

    def each(self, section: dict[str, list[str]], *keys: str) -> Iterator[re.Pattern[str]]:
        """Returns the patterns of some lists of a section."""
        return (self.compiled(section[key]) for key in keys)

    def compiled(self, phrases: list[str]) -> re.Pattern[str]:
        """Returns the pattern of any of the phrases, in a text as `read` gives it."""
        return re.compile(f"(?<= )(?:{self.either(phrases)})(?= )")

    def either(self, phrases: list[str]) -> str:
        """Returns the same, not compiled; those that begin with one word are tried together."""
        starts: dict[str, list[str]] = {}
        for phrase in phrases:
            first, *others = phrase.split()
            rest = "".join(self.gaps.get(token) or f" {self.word(token)}" for token in others)
            starts.setdefault(self.word(first), []).append(rest)
        return "|".join(f"{first}(?:{'|'.join(rests)})" if any(rests) else first for first, rests in starts.items())

    def word(self, token: str) -> str:
        """Returns the pattern of one word of a phrase."""
        if "/" in token:
            return f"(?:{'|'.join(map(self.word, token.split('/')))})"
        if token in self.lists:
            return f"(?:{self.either(self.lists[token])})"
        return r"\d[\d.,]*" if token == "N" else re.escape(normal(token)).replace(r"\*", r"\w*")

    def content(self, text: str) -> frozenset[str]:
        """Stems of the words that name something, in the terms of `same`."""
        for name, pattern in self.same.items():
            text = pattern.sub(name, text)
        return frozenset(word[:_STEM] for word in self.empty.sub("", text).split() if word.isalnum())

    def stands(self, phrase: Phrase, said: frozenset[str]) -> bool:
        """Returns whether a phrase is said of this patient: not asked, not denied, and on no condition that is not
        met.
        """
        if phrase.asked and not self.request.search(phrase.clause):
            return False
        if self.denial.search(phrase.clause) or self.denied_after.search(phrase.after):
            return False
        return all(self.met(condition, phrase.earlier, said) for condition in self.hangs_on(phrase))

    def meant(self, phrase: Phrase, said: frozenset[str]) -> bool:
        """Returns whether what a phrase is said to follow from, as in "chest pain means an ambulance", is what they
        said.
        """
        told = f"{phrase.before}{phrase.words} "
        if not (means := self.means.search(told)):
            return True
        subject = self.same["emergency"].sub("illness", told[: means.start()])  # "a stroke" means that of nobody
        noun = f" {subject.rstrip(' ,').rpartition(',')[2]} "  # "for that, you need one" is said of the patient
        named = self.content(noun) or self.any_of.search(noun)
        return not named or self.met(subject, phrase.earlier, said)

    def hangs_on(self, phrase: Phrase) -> Iterator[str]:
        """Yields the conditions of a phrase: before it ("if you faint, call") and after it, in its own clause."""
        before = phrase.before[phrase.before.rfind(" but ") + 1 :]
        if found := self.fronted.search(before) or self.condition.search(before):
            yield before[found.end() :]
        listed = before[: before.rfind(" : ,") + 1]  # "black stools, fainting: call"
        if (" , " in listed or " or " in listed) and not self.somebody.search(listed):
            yield listed
        after = phrase.after.partition(" but ")[0]
        if (found := self.following.search(after)) and "," not in after[: found.start()].removesuffix(", "):
            yield f"{after[found.end() :]} "

    def met(self, condition: str, earlier: str, said: frozenset[str]) -> bool:
        """Returns whether one of the things that a condition lists is what the patient said."""
        if self.about_to.search(condition):
            return True
        for part in re.split(r"(?<= )(?:,|or)(?= )", condition):
            if self.new.search(part):
                return False  # and so is what follows: "if she becomes drowsy or has a fit"
            named = self.content(part)
            if named and (named <= said or (ALARM in said and named & said)):
                return True
            if not named and self.pointing.search(part):
                recent = f" {' , '.join(_END.split(earlier.rstrip(' .?'))[-_RECENT:])} "
                others = self.listing.search(recent) or self.any_of.search(part)
                return not others or self.met(recent, "", said)
        return False

    def relates(self, phrase: Phrase, patient: Patient) -> bool:
        """Returns whether a phrase speaks of what the patient wrote about."""
        sentence = phrase.sentence
        return not patient.topics or bool(self.pronoun.search(sentence) or stems(sentence) & patient.topics)

    def patient(self, message: str) -> Patient:
        """Returns what a message says."""
        text = read(message)
        denied = stems(" ".join(found[0] for found in self.denies.finditer(text)))
        said = self.content(self.denies.sub(" ", text)) - {ALARM}
        if red_flag(message):
            said |= {ALARM}
        asks = (self.taking.search(text) or self.medicine.search(text)) and self.asking.search(text)
        topics, unknown = stems(text) - self.ordinary, not message.strip()
        believes = self.belief.search(text)
        return Patient(text, said, topics, denied & topics, unknown or bool(asks), unknown or bool(believes))

    def nearest(self, phrase: Phrase) -> re.Match[str] | None:
        """Returns the medicine that its sentence names nearest to a phrase."""
        before, after = last(self.medicine, phrase.before), self.medicine.search(f" {phrase.words}{phrase.after}")
        if before and after:
            return before if len(phrase.before) - before.end() < after.start() - len(phrase.words) else after
        return before or after
