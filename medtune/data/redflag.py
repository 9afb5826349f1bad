"""An audit of training data: which patients' messages call for urgent care, and which answers say so.

A model trained on answers that miss an emergency gets less safe than its base. This reads words, not patients: it
finds the plain cases, and is neither a triage tool nor a proof that a row is harmless.

All that is medical is in `redflags.yaml`, which explains itself; here is only how that table is read.
"""

import re
from functools import cache, reduce
from itertools import product
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_SPACE = r"[^\w.!?]+"  # between two words of a phrase
_GAP = rf"{_SPACE}(?:\w+{_SPACE}){{0,4}}?"  # the same, with up to four other words
_WINDOW = 350  # characters; the signs of a rule lie in two sentences running, or in more that are shorter than this
_WORDS = re.compile(r"[a-z]+|\d+")
_APOSTROPHES = re.compile("['\u2018\u2019`\u00b4]")
_ENDS = re.compile(r"[.!?;\n]+")
_ORDINARY = 0.4  # a sign of many such words is not looked for at first
_NUMBER = re.compile(r"[\dN.]+")
_LONGEST_NUMBER = 4  # digits
_STUCK = re.compile(r"(?<=\d)(?=[a-z])")


class Sign(NamedTuple):
    """What a rule looks for."""

    pattern: str
    keys: frozenset[str]  # words ("*": any ending) one of which it cannot do without
    bits: int  # of all the words and lists that it cannot do without, for `Table.candidates`


class Rule(NamedTuple):
    """Signs that together are an emergency, unless there is one of `unless`, too."""

    category: str
    example: str
    bits: int
    signs: list[re.Pattern[str]]
    unless: list[re.Pattern[str]]


def normal(text: str) -> str:
    """The text in lower case without apostrophes: "can't" and "cant" become one."""
    return _APOSTROPHES.sub("", text.lower())


class Table:
    """The rules and word lists of `redflags.yaml`, compiled."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.lists: dict[str, list[str]] = content["words"]
        self.ordinary = frozenset(content["ordinary words"])
        self.known: dict[str, Sign] = {}
        self.numbers: dict[str, int] = {}  # pattern -> the number of its bit
        self.follows: dict[str, set[tuple[int, int]]] = {}  # key -> these bits together mean that bit, too
        self.of_word: dict[str, tuple[int, list[tuple[int, int]]]] = {}
        self.idle: set[str] = set()  # words that mean nothing to any rule
        self.rules: list[Rule] = []
        for category, rules in content["emergencies"].items():
            for example, parts in rules.items():
                signs = [self.sign(str(part).split(" / ")) for part in parts if not str(part).startswith("unless ")]
                unless = [part[7:].split(" / ") for part in parts if str(part).startswith("unless ")]
                bits = reduce(or_, (sign.bits for sign in signs))
                patterns = [
                    re.compile(rf"\b{sign.pattern}\b") for sign in sorted(signs, key=lambda sign: len(sign.pattern))
                ]
                self.rules.append(Rule(category, example, bits, patterns, [self.compiled(part) for part in unless]))

        back = content["taken_back"]
        negative = self.compiled(back["denied"])
        phrases = [str(p) for rules in content["emergencies"].values() for parts in rules.values() for p in parts]
        phrases = [one for p in phrases for one in p.removeprefix("unless ").split(" / ")]
        phrases += [str(one) for phrases_of_list in self.lists.values() for one in phrases_of_list]
        kept = list(back["not denied"])  # and what the table itself says with "not": "rash ... NOT fade*"
        for tokens in (part.split() for phrase in phrases for part in phrase.split(" + ")):
            words = [normal(" ".join(map(str, self.lists.get(token, [token])))) for token in tokens]
            start = next((number for number, word in enumerate(words) if negative.search(word)), len(tokens))
            if len(tokens) - start > 1:
                kept.append(" ".join(tokens[start:]))
        word = rf"[ /-]+(?!{self.whole(back['denial ends'])})\w+"
        self.denied = re.compile(
            rf"(?={negative.pattern})(?!{self.whole(kept)}){negative.pattern}"
            rf"(?:{word}){{0,5}}(?:(?:,(?:{word}){{1,4}}){{0,6}},?[ ](?:or|nor|and)(?:{word}){{1,4}})?"
            rf"|{self.whole(back['hypothetical'])}[^.!?]*"
        )
        self.breaks = re.compile(rf"[.!?;]+(?=\s|$)|\n|(?={self.whole(back['new clause'])})")
        asked = rf"^\W*(?:{self.whole(back['asked'])})(?!.*{self.whole(back['somebody'])})"
        past, long = self.whole(back["past"]), self.whole(back["long"])
        about = self.whole(back["about"])
        self.old, self.old_or_long = (re.compile(rf"{asked}|{p}|{about}") for p in (past, rf"{past}|{long}"))

        answers = content["answers"]
        self.urges, self.crisis = self.compiled(answers["urging"]), self.compiled(answers["crisis"])
        self.conditional = self.compiled(answers["conditional"])
        place = self.sign(["PLACE", "URGENT", "hospital"]).pattern
        fillers = rf"(?:[ -]+{self.sign(answers['fillers']).pattern})"
        self.not_urging = re.compile(rf"(?<!if ){self.whole(answers['not'])}{fillers}{{0,8}}[ -]+{place}\b")

    def compiled(self, phrases: list[str]) -> re.Pattern[str]:
        """The pattern of any of the phrases."""
        return re.compile(self.whole(phrases))

    def whole(self, phrases: list[str]) -> str:
        """The same, not compiled: it begins and ends where words do."""
        return rf"\b{self.sign(phrases).pattern}\b"

    def sign(self, phrases: list[str]) -> Sign:
        """Any of the phrases, as they stand in the table."""
        signs = [self.phrase(str(phrase)) for phrase in phrases]
        starts: dict[str, list[str]] = {}  # those that begin with the same letter are tried together
        for start, rest in ((sign.pattern[0], sign.pattern[1:]) for sign in signs):
            starts.setdefault(start if start.isalpha() else start + rest, []).append(rest if start.isalpha() else "")
        pattern = "|".join(f"{start}(?:{'|'.join(rests)})" if any(rests) else start for start, rests in starts.items())
        pattern = f"(?:{pattern})"
        keys = frozenset[str]().union(*(sign.keys for sign in signs))
        if self.commonness(keys) > _ORDINARY or not all(sign.bits for sign in signs):
            return Sign(pattern, keys, 0)
        bit = self.bit(pattern)
        for sign in signs:
            for key in sign.keys:
                self.follows.setdefault(key, set()).add((bit, sign.bits))
        return Sign(pattern, keys, bit)

    def commonness(self, keys: frozenset[str]) -> float:
        """How often one of the keys may be met, roughly."""
        return sum(0.1 if key in self.ordinary else 8.0 ** -len(key.rstrip("*")) for key in keys)

    def bit(self, pattern: str) -> int:
        """A power of two that stands for a pattern."""
        return 1 << self.numbers.setdefault(pattern, len(self.numbers))

    def phrase(self, phrase: str) -> Sign:
        """One phrase: "+" joins two parts in either order, "..." leaves a gap, capitals name a list."""
        if " + " in phrase:
            one, two = (self.phrase(part) for part in phrase.split(" + "))
            pattern = f"(?:{one.pattern}{_GAP}{two.pattern}|{two.pattern}{_GAP}{one.pattern})"
            return Sign(pattern, min(one.keys, two.keys, key=self.commonness), one.bits | two.bits)
        parts = [[self.token(token) for token in part.split()] for part in phrase.split(" ... ")]
        tokens = [token for part in parts for token in part]
        pattern = _GAP.join(_SPACE.join(sign.pattern for sign in part) for part in parts)
        return Sign(pattern, min((t.keys for t in tokens), key=self.commonness), reduce(or_, (t.bits for t in tokens)))

    def token(self, token: str) -> Sign:
        """One word, number or list of a phrase."""
        if token in self.lists:
            if token not in self.known:
                self.known[token] = self.sign(self.lists[token])
            return self.known[token]
        if token == "*":  # any word: no first look can miss it
            return Sign(r"\w*", frozenset("*"), 0)
        if "_" in token:
            raise ValueError(f"redflags.yaml: there is no list {token}")
        if _NUMBER.fullmatch(token):
            pattern, word = token.replace(".", "[.,]").replace("N", r"\d") + r"(?:[.,]\d+)?", token.partition(".")[0]
        else:
            word = normal(token)
            pattern = word.replace("*", r"\w*")
        self.follows.setdefault(word, set()).add((self.bit(word), 0))
        return Sign(pattern, frozenset([word]), self.bit(word))

    def look_up(self, word: str) -> tuple[int, list[tuple[int, int]]]:
        """What follows from a word: bits, and pairs of a bit and the bits needed for it."""
        if word.isdigit():  # 38 is also 3N, N8 and NN
            stems = ["".join(digits) for digits in product(*((digit, "N") for digit in word[:_LONGEST_NUMBER]))]
        else:
            stems = [word, *(f"{word[:end]}*" for end in range(1, len(word) + 1))]
        own = 0
        more: list[tuple[int, int]] = []
        for bit, needed in sorted({pair for stem in stems for pair in self.follows.get(stem, ())}):
            if needed & own == needed:
                own |= bit
            else:
                more.append((bit, needed))
        if len(self.of_word) + len(self.idle) > 200_000:
            self.of_word.clear()
            self.idle.clear()
        if own or more:
            self.of_word[word] = own, more
        else:
            self.idle.add(word)
        return own, more

    def candidates(self, text: str) -> list[Rule]:
        """The rules all of whose words are somewhere in the text: a cheap first look."""
        bits = 0
        more: list[tuple[int, int]] = []
        for word in set(_WORDS.findall(text)) - self.idle:
            own, pairs = self.of_word.get(word) or self.look_up(word)
            bits |= own
            if pairs:
                more += pairs
        for bit, needed in sorted(more):  # a list's bit is greater than those of the lists in it
            if needed & bits == needed:
                bits |= bit
        return [rule for rule in self.rules if rule.bits & bits == rule.bits]

    def present(self, text: str, category: str) -> list[str]:
        """Windows of neighbouring sentences, less what is denied, past or asked; wanting to die is never too old."""
        old = self.old if category == "suicide" else self.old_or_long
        text = self.denied.sub(" - ", text)
        sentences = [s for s in self.breaks.split(text) if s.strip() and not old.search(s)]
        windows = []
        for start, window in enumerate(sentences):
            for number, sentence in enumerate(sentences[start + 1 : start + 6]):
                if number and len(window) + len(sentence) > _WINDOW:
                    break
                window += f". {sentence}"
            windows.append(window)
        return windows


@cache
def table() -> Table:
    """The table of this package, read when it is first needed."""
    return Table(yaml.load(Path(__file__).with_name("redflags.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader))


def red_flag(question: str) -> str | None:
    """The name of the emergency that a patient's words describe (one of `redflags.yaml`), or None.

    `question` is all that the patient wrote. Negated, past and merely asked-about signs do not count.
    """
    text = normal(question)
    rules = table().candidates(text)
    text = _STUCK.sub(" ", text) if rules else ""
    return next((rule.category for rule in rules if holds(rule, text)), None)


def holds(rule: Rule, text: str) -> bool:
    """Whether a rule's signs are in a normal text, and still, near one another, once some are taken back."""
    if not all(sign.search(text) for sign in rule.signs):
        return False
    return any(
        all(sign.search(window) for sign in rule.signs) and not any(sign.search(window) for sign in rule.unless)
        for window in table().present(text, rule.category)
    )


def urges_care(answer: str, category: str) -> bool:
    """Whether an answer sends the patient to urgent care: emergency services, or a doctor or hospital now.

    For "suicide" a crisis line or not staying alone counts too. "See a doctor", "no need for the ER" and "go to
    hospital if it gets worse" do not count.
    """
    for sentence in _ENDS.split(normal(answer)):
        if worse := table().conditional.search(sentence):
            sentence = sentence[: sentence.rfind(",", 0, worse.start()) + 1]
        sentence = table().not_urging.sub(" - ", sentence)
        if table().urges.search(sentence) or (category == "suicide" and table().crisis.search(sentence)):
            return True
    return False
