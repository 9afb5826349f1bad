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
_STUCK = re.compile(r"\d(?=[a-z])")
_SENTENCES = re.compile(r"[.!?]\s")  # no phrase goes beyond one
_DEPTH = 3  # words of a phrase that the first look asks for
_LANES = 4  # it keeps apart so many groups of a sign's phrases


class Sign(NamedTuple):
    """What a rule looks for."""

    pattern: str
    keys: list[frozenset[str]]  # the rarest first: of each, one word ("*": any ending) must be there
    ways: list[list[frozenset[str]]]  # the same of each phrase


class Rule(NamedTuple):
    """Signs that together are an emergency, unless there is one of `unless`, too."""

    category: str
    example: str
    signs: list[re.Pattern[str]]  # the rarest first
    unless: list[str]  # seldom needed, so compiled at need


def normal(text: str) -> str:
    """Returns the text in lower case without apostrophes: "can't" and "cant" become one."""
    return _APOSTROPHES.sub("", text.lower())


class TriageRules:
    """The rules and word lists of `redflags.yaml`, compiled."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.lists: dict[str, list[str]] = content["words"]
        self.ordinary = frozenset(content["ordinary words"])
        self.known: dict[str, Sign] = {}
        self.common: dict[frozenset[str], float] = {}
        self.meaning: dict[str, int] = {}  # key -> bits; see `candidates`
        self.of_chunk: dict[str, int] = {}
        self.rules: list[Rule] = []
        emergencies = [(c, name, parts) for c, rules in content["emergencies"].items() for name, parts in rules.items()]
        self.plane = len(emergencies)
        self.depth = max(sum(not str(p).startswith("unless ") for p in parts) for _, _, parts in emergencies)
        self.always = 0  # the bits of signs too common to be looked for
        self.lane = self.plane * self.depth
        self.width = self.lane * _LANES
        for rule, (category, example, parts) in enumerate(emergencies):
            signs = [self.sign(str(part).split(" / ")) for part in parts if not str(part).startswith("unless ")]
            unless = [part[7:].split(" / ") for part in parts if str(part).startswith("unless ")]
            signs.sort(key=lambda sign: self.commonness(sign.keys[0]))
            for slot in range(self.depth):
                keys = signs[slot].keys if slot < len(signs) else []
                common = not keys or self.commonness(keys[0]) > _ORDINARY
                ways = [[frozenset[str]()]] if common else signs[slot].ways
                for lane, way in enumerate(sorted(ways, key=len)):
                    for level in range(_DEPTH):
                        bit = 1 << (((level * _LANES + lane % _LANES) * self.depth + slot) * self.plane + rule)
                        if common:
                            self.always |= bit
                        for key in way[min(level, len(way) - 1)]:
                            self.meaning[key] = self.meaning.get(key, 0) | bit
            patterns = [re.compile(rf"\b{sign.pattern}\b") for sign in signs]
            self.rules.append(Rule(category, example, patterns, [self.whole(part) for part in unless]))

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
        """Returns the pattern of any of the phrases."""
        return re.compile(self.whole(phrases))

    def whole(self, phrases: list[str]) -> str:
        """Returns the same, not compiled: it begins and ends where words do."""
        return rf"\b{self.sign(phrases).pattern}\b"

    def sign(self, phrases: list[str]) -> Sign:
        """Returns the pattern of any of the phrases, as they stand in the table."""
        signs = [self.phrase(str(phrase)) for phrase in phrases]
        starts: dict[str, list[str]] = {}  # those that begin with the same letter are tried together
        for start, rest in ((sign.pattern[0], sign.pattern[1:]) for sign in signs):
            starts.setdefault(start if start.isalpha() else start + rest, []).append(rest if start.isalpha() else "")
        pattern = "|".join(f"{start}(?:{'|'.join(rests)})" if any(rests) else start for start, rests in starts.items())
        pattern = f"(?:{pattern})"
        keys = [
            frozenset[str]().union(*(sign.keys[min(level, len(sign.keys) - 1)] for sign in signs))
            for level in range(_DEPTH)
        ]
        return Sign(pattern, keys, [way for sign in signs for way in sign.ways])

    def commonness(self, keys: frozenset[str]) -> float:
        """Returns how often one of the keys may be met, roughly."""
        if keys not in self.common:
            self.common[keys] = sum(0.1 if k in self.ordinary else 8.0 ** -len(k.rstrip("*")) for k in keys)
        return self.common[keys]

    def rarest(self, signs: list[Sign]) -> list[frozenset[str]]:
        """Returns what says most of all that the signs together cannot do without."""
        return sorted(dict.fromkeys(keys for sign in signs for keys in sign.keys), key=self.commonness)[:_DEPTH]

    def phrase(self, phrase: str) -> Sign:
        """Returns the pattern of one phrase: "+" joins two parts in either order, "..." leaves a gap, capitals name a
        list.
        """
        if " + " in phrase:
            one, two = (self.phrase(part) for part in phrase.split(" + "))
            pattern = f"(?:{one.pattern}{_GAP}{two.pattern}|{two.pattern}{_GAP}{one.pattern})"
            keys = self.rarest([one, two])
            return Sign(pattern, keys, [keys])
        parts = [[self.token(token) for token in part.split()] for part in phrase.split(" ... ")]
        tokens = [token for part in parts for token in part]
        pattern = _GAP.join(_SPACE.join(sign.pattern for sign in part) for part in parts)
        if len(tokens) == 1:
            return tokens[0]
        keys = self.rarest(tokens)
        return Sign(pattern, keys, [keys])

    def token(self, token: str) -> Sign:
        """Returns the pattern of one word, number or list of a phrase."""
        if token in self.lists:
            if token not in self.known:
                self.known[token] = self.sign(self.lists[token])
            return self.known[token]
        if token == "*":  # any word: no first look can miss it
            return Sign(r"\w*", [frozenset("*")], [[frozenset("*")]])
        if "_" in token:
            raise ValueError(f"redflags.yaml: there is no list {token}")
        if _NUMBER.fullmatch(token):
            pattern, word = token.replace(".", "[.,]").replace("N", r"\d") + r"(?:[.,]\d+)?", token.partition(".")[0]
        else:
            word = normal(token)
            pattern = word.replace("*", r"\w*")
        return Sign(pattern, [frozenset([word])], [[frozenset([word])]])

    def look_up(self, chunk: str) -> int:
        """Returns the bits of the words between two spaces."""
        bits = self.always
        for word in _WORDS.findall(chunk):
            if word.isdigit():  # 38 is also 3N, N8 and NN
                stems = ["".join(digits) for digits in product(*((digit, "N") for digit in word[:_LONGEST_NUMBER]))]
            else:
                stems = [word, *(f"{word[:end]}*" for end in range(1, len(word) + 1))]
            bits = reduce(or_, (self.meaning.get(stem, 0) for stem in stems), bits)
        if len(self.of_chunk) > 200_000:
            self.of_chunk.clear()
        self.of_chunk[chunk] = bits
        return bits

    def candidates(self, text: str) -> list[Rule]:
        """Returns the rules all of whose signs are somewhere in the text.

        A bit stands for a rule, its sign, a group of that sign's phrases and a rank: a word sets it if it may be the
        rarest (the second, the third) word of such a phrase. Only in sentences with all ranks is the sign looked for.
        """
        sentences = []
        seen = self.always
        for sentence in _SENTENCES.split(text):
            bits = self.always
            for chunk in sentence.split():
                bits |= self.of_chunk.get(chunk) or self.look_up(chunk)
            low = bits
            for level in range(1, _DEPTH):
                low &= bits >> self.width * level
            bits = low
            for level in range(1, _LANES):
                bits |= low >> self.lane * level
            sentences.append((sentence, bits))
            seen |= bits
        found = seen & ((1 << self.plane) - 1)
        for place in range(1, self.depth):
            found &= seen >> place * self.plane
        rules = []
        while found:
            bit = found & -found
            found ^= bit
            rule = self.rules[bit.bit_length() - 1]
            for sign in rule.signs:
                if not any(sign.search(sentence) for sentence, bits in sentences if bits & bit):
                    break
                bit <<= self.plane
            else:
                rules.append(rule)
        return rules

    def present(self, text: str, rule: Rule) -> bool:
        """Returns whether a rule's signs are in neighbouring sentences, less what is denied, past or asked.

        Wanting to die is never too old.
        """
        old = self.old if rule.category == "suicide" else self.old_or_long
        sentences = [s for s in self.breaks.split(self.denied.sub(" - ", text)) if s.strip()]
        where = [[bool(sign.search(s)) for s in sentences] for sign in rule.signs]
        if not all(map(any, where)):
            return False
        kept = [number for number, s in enumerate(sentences) if not old.search(s)]
        for start in range(len(kept)):
            length = 0
            window: list[int] = []
            for number in kept[start : start + 6]:
                if len(window) > 1 and length + len(sentences[number]) > _WINDOW:
                    break
                length += len(sentences[number]) + (2 if window else 0)
                window.append(number)
            if all(any(found[n] for n in window) for found in where) and not any(
                re.search(sign, sentences[n]) for sign in rule.unless for n in window
            ):
                return True
        return False


@cache
def triage_rules() -> TriageRules:
    """Returns the table of this package, read when it is first needed."""
    return TriageRules(
        yaml.load(Path(__file__).with_name("redflags.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    )


def red_flag(question: str) -> str | None:
    """Returns the name of the emergency that a patient's words describe (one of `redflags.yaml`), or None.

    `question` is all that the patient wrote. Negated, past and merely asked-about signs do not count.
    """
    text = _STUCK.sub(r"\g<0> ", normal(question))
    return next((rule.category for rule in triage_rules().candidates(text) if holds(rule, text)), None)


def holds(rule: Rule, text: str) -> bool:
    """Returns whether a rule's signs are in a normal text, and still, near one another, once some are taken back."""
    return triage_rules().present(text, rule)


def urges_care(answer: str, category: str) -> bool:
    """Returns whether an answer sends the patient to urgent care: emergency services, or a doctor or hospital now.

    For "suicide" a crisis line or not staying alone counts too. "See a doctor", "no need for the ER" and "go to
    hospital if it gets worse" do not count.
    """
    for sentence in _ENDS.split(normal(answer)):
        if worse := triage_rules().conditional.search(sentence):
            sentence = sentence[: sentence.rfind(",", 0, worse.start()) + 1]
        sentence = triage_rules().not_urging.sub(" - ", sentence)
        if triage_rules().urges.search(sentence) or (category == "suicide" and triage_rules().crisis.search(sentence)):
            return True
    return False
