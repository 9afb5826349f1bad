"""An answer -> the facts that a clinician would check in it, each affirmed or denied; two answers -> how these agree.

Overlap of words and cosine cannot tell "take aspirin" from "do not take aspirin"; this can, and sees little else. It
reads words, in the manner of NegEx (Chapman et al. 2001, A simple algorithm for identifying negated findings and
diseases in discharge summaries), and knows neither who has a finding nor whether an advice is good.

All that is medical or English is in `facts.yaml`, which explains itself; here is only how that table is read.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import cache
from itertools import chain, groupby
from math import nan
from pathlib import Path
from typing import Any

import yaml

from medtune.data.cleaning.boilerplate import BOILERPLATE, LONGEST

REACH = 10  # words that a denial reaches where nothing ends it before
START, END = "(?<![^ ])", "(?![^ ])"  # of a word
GAP = rf"(?: (?!(?:and|but|if|or|so|as|when|unless){END})[^ ,]+){{0,3}}"
# The comma of a list, as in "no fever, cough or rash", does not end a denial; one before a clause does.
CLAUSE = ",(?! (?:(?:and|or|nor) )?[^ ,]+(?: [^ ,]+){0,2}(?: ,| and | or | nor |$))"

SENTENCE = re.compile(r"([.!?;:\u2026]+(?=\s|$)|\n|(?<=[a-z])[.!?](?=[A-Z]))")
# What is read as what, one after the other.
READINGS = [
    (re.compile(pattern), reading)
    for pattern, reading in (
        ("['\u2018\u2019`\u0300-\u036f]", ""),  # "don't" and "dont", accents
        ("\u03bcg", "mcg"),
        ("ae|oe(?=d|s[ot]|a\\b|li|tu)", "e"),  # anaemia, oedema, diarrhoea
        ("(?<=tum|hum|lab|col)our", "or"),
        (r"\b(do|does|did|is|are|was|were|has|have|had|would|should|could|must|need)nt\b", r"\1 not"),
        (r"\bcan ?not\b|\bcant\b", "can not"),
        (r"\bwont\b", "will not"),
        (r"\bnever\b", "not"),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # 1,000 mg
        (r"(?<=\d) ?[-\u2010-\u2015] ?(?=\d)", " to "),  # 5-7 days
        (r"[,()\[\]\u2013\u2014\u2026]+|\s-+\s", " , "),
        (r"[^a-z0-9.,/%]+|(?<!\d)\.|\.(?!\d)", " "),
    )
]


def normal(text: str) -> str:
    """Returns the text in lower case and one spelling, with one space between words and around commas."""
    text = unicodedata.normalize("NFKD", text).lower()
    for pattern, reading in READINGS:
        text = pattern.sub(reading, text)
    return " ".join(text.split())


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a text that assert something, `normal`: no questions, no courtesies ("Get well soon")."""
    parts = SENTENCE.split(text)
    for sentence, mark in zip(parts[::2], [*parts[1::2], ""], strict=True):
        if "?" not in mark and not (len(sentence) < LONGEST and BOILERPLATE.fullmatch(sentence.strip().lower())):
            yield normal(sentence)


class Phrases:
    """Phrases in the language of `facts.yaml`: finds them in a sentence, and knows what each means."""

    def __init__(
        self, words: Mapping[str, list[str]], meanings: Mapping[str, str], plural: str = "", other: str = "(?!)"
    ) -> None:
        """`plural`: a pattern that may follow a phrase; `other`: one of words that mean themselves, as its group 1."""
        self.words = words
        spelled = {one: meaning for phrase, meaning in meanings.items() for one in self.spelled(phrase)}
        order = sorted(spelled, key=lambda phrase: (phrase[0], -len(phrase)))
        self.meanings = [spelled[phrase] for phrase in order]
        patterns = [self.pattern(phrase) + plural for phrase in order]
        # A group for each phrase would tell at once which one it is, but takes twenty times as long to search for.
        self.which = re.compile("|".join(f"({pattern})" for pattern in patterns))
        letters = groupby(patterns, key=lambda pattern: pattern[0])  # so that a word is compared with its like only
        some = "|".join(f"{letter}(?:{'|'.join(pattern[1:] for pattern in group)})" for letter, group in letters)
        self.any = re.compile(f"{START}(?:{some}|{other}){END}")
        self.known: dict[str, str] = {}

    def spelled(self, phrase: str) -> list[str]:
        """Returns the phrase in lower case; where it begins with the name of a list, once for each word of that
        list.
        """
        first, _, rest = phrase.partition(" ")
        return [f"{one} {rest}".strip() for one in self.words.get(first, [first.lower()])]

    def pattern(self, phrase: str) -> str:
        """Returns a phrase as a regular expression."""
        pattern = ""
        for token in phrase.split():
            if token == "...":
                pattern += GAP
            elif token in self.words:
                pattern += f" (?:{'|'.join(map(self.pattern, self.words[token]))})"
            else:
                pattern += " " + "[a-z]*".join(map(normal, token.split("*")))
        return re.sub("y$", "(?:y|ie)", pattern[1:])

    def find(self, sentence: str) -> Iterator[tuple[str, re.Match[str]]]:
        """Yields what each phrase in the sentence means, and where it is."""
        for found in self.any.finditer(sentence):
            if found[0] not in self.known:
                which = self.which.fullmatch(found[0])
                self.known[found[0]] = self.meanings[which.lastindex - 1] if which and which.lastindex else found[1]
            yield self.known[found[0]], found


class Quantities:
    """Finds numbers with a unit, "500 mg", and rates, "twice daily". A range is its two ends."""

    def __init__(self, content: Mapping[str, Mapping[str, Any]]) -> None:
        """`content`: the units, numerals and rates of `facts.yaml`."""
        numerals, rates = content["numerals"], content["rates"]
        self.numerals = {word: Fraction(str(value)) for word, value in {**numerals, **rates}.items()}
        self.units = {u: (name, Fraction(str(n))) for name, units in content["units"].items() for u, n in units.items()}
        number = rf"(?:\d{{1,9}}(?:\.\d{{1,9}})?|{longest_first(numerals)})"
        some = f"{number}(?: (?:to|or|and) {number})?"
        per = "(?: ?times?)?(?: a| an| per| each| every| in a)? (?P<per>day|dai|week|month|year|hour)(?:ly)?"
        self.any = re.compile(
            rf"{START}(?:(?P<pressure>\d\d\d?/\d\d\d?)|(?P<times>{some}(?= ?times)|once|twice|thrice){per}"
            rf"|every (?P<every>{some}) ?h(?:ou)?rs?|(?P<hourly>{some}) ?hourly|(?P<rate>{longest_first(rates)})"
            rf"|(?P<amount>{some}) ?(?P<unit>{longest_first(self.units)})s?(?! old)){END}"
        )

    def find(self, sentence: str) -> Iterator[tuple[str, re.Match[str]]]:
        """Yields the name of each quantity in the sentence, and where it is."""
        for found in self.any.finditer(sentence):
            for name in self.names(found):
                yield name, found

    def names(self, found: re.Match[str]) -> list[str]:
        """Returns one name for all ways of writing a quantity: "1 g" is "1000 mg", and "every 8 hours" is "3 a day"."""
        match found.lastgroup:
            case "unit":
                name, factor = self.units[found["unit"]]
                return [f"{round(float(n * factor), 4):g} {name}" for n in self.numbers(found["amount"])]
            case "per":
                return [f"{float(n):g} a {found['per'].replace('dai', 'day')}" for n in self.numbers(found["times"])]
            case "every" | "hourly" as hours:
                return [f"{float(24 / n):.3g} a day" for n in self.numbers(found[hours]) if n]
            case "rate":
                return [f"{float(self.numerals[found[0]]):g} a day"]
        return [found[0]]  # blood pressure

    def numbers(self, text: str) -> list[Fraction]:
        """Returns the number, or the two of a range."""
        return [self.numerals.get(n) or Fraction(n) for n in re.split(" (?:to|or|and) ", text)]


def longest_first(words: Iterable[str]) -> str:
    """Returns a pattern for one of these words."""
    return "|".join(sorted(words, key=len, reverse=True))


class Table:
    """`facts.yaml`, compiled."""

    def __init__(self, content: dict[str, Any]) -> None:
        words, denials = content["words"], content["denials"]
        sections = [content[name] for name in ("drugs", "findings", "care")]
        names = {name: others for section in sections for name, others in section["names"].items()}
        names |= {name: [] for section in sections for name in section["others"]}
        endings, unlike = ("|".join(w for s in sections for w in s[key]) for key in ("endings", "unlike"))
        word = rf"((?!(?:{unlike})s?{END})[a-z]+(?:{endings}))s?"
        self.quantities = Quantities(content["quantities"])
        self.names = Phrases(words, meanings(names), "(?:e?s)?", word)
        kinds = {phrase: kind for kind in ("none", "ahead", "around") for phrase in denials[kind]}
        self.denials = Phrases(words, kinds)
        ends, ahead = dict.fromkeys(denials["ends"], ""), dict.fromkeys(denials["ends ahead"], "")
        self.ends = Phrases(words, ends, other=CLAUSE).any
        self.ends_ahead = Phrases(words, ends | ahead, other=CLAUSE).any

    def facts(self, sentence: str) -> Iterator[tuple[str, bool]]:
        """Yields each mention of a fact in a sentence, and whether it is affirmed: two denials cancel out."""
        denied = list(self.denied(sentence))
        for fact, found in chain(self.quantities.find(sentence), self.names.find(sentence)):
            denials = sum(start <= found.start() < end for start, end in denied) + fact.startswith("not ")
            yield fact.removeprefix("not "), denials % 2 == 0

    def denied(self, sentence: str) -> Iterator[tuple[int, int]]:
        """Yields the parts of a sentence that are denied in it, from where to where."""
        for kind, found in self.denials.find(sentence):
            start, end = found.span()
            if kind == "none":
                continue
            reached = end + len(" ".join(sentence[end:].split(" ", REACH + 1)[: REACH + 1]))
            if kind == "around":
                end = start + found[0].rfind(" ")  # "does not help see a doctor": the end may begin with its last word
                start -= len(" ".join(sentence[:start].rsplit(" ", REACH + 1)[-REACH - 1 :]))
                start = max([start, *(stop.end() for stop in self.ends.finditer(sentence, start, found.start()))])
            stop = self.ends_ahead.search(sentence, end, reached)
            yield start, stop.start() if stop else reached


def meanings(names: Mapping[str, list[str]]) -> dict[str, str]:
    """Returns phrase -> fact, or "not " and the fact where the phrase is its opposite."""
    known = {}
    for name, others in names.items():
        for phrase in [name, *others]:
            opposite = "not " if phrase.startswith("not ") else ""
            known[phrase.removeprefix("not ")] = opposite + name
    return known


@cache
def table() -> Table:
    """Returns the tables of this package, compiled when they are first needed."""
    return Table(yaml.load(Path(__file__).with_name("facts.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader))


def facts(text: str) -> dict[str, bool]:
    """Returns the facts in a text, and whether each is affirmed.

    A fact that is both affirmed and denied counts as the text does more often; at a tie, as it did first. A text whose
    every mention is turned into its opposite has therefore the opposite facts.
    """
    votes: dict[str, list[bool]] = defaultdict(list)
    for sentence in sentences(text):
        for fact, affirmed in table().facts(sentence):
            votes[fact].append(affirmed)
    return {fact: 2 * sum(vote) + vote[0] > len(vote) for fact, vote in votes.items()}


def agreement(answer: str, reference: str) -> float:
    """Returns the F1 of the pairs (fact, affirmed or denied) of an answer; NaN where the reference has none."""
    told, known = set(facts(answer).items()), set(facts(reference).items())
    return 2 * len(told & known) / (len(told) + len(known)) if known else nan


def contradicted(answer: str, reference: str) -> float:
    """Returns the share of the facts in both texts that one affirms and the other denies; NaN where they share none.

    Two doctors who answer the same question differ, too: in about one of seven shared facts.
    """
    told, known = facts(answer), facts(reference)
    shared = told.keys() & known.keys()
    return sum(told[fact] != known[fact] for fact in shared) / len(shared) if shared else nan
