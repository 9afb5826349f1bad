"""Screened rows, in order -> the split of each, or the rule that leaves it out.

What becomes of a row depends on earlier rows only: rows added at the end change nothing before them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medtune.config.schema import Data, Source
from medtune.data.hashing import jaccard
from medtune.data.splitting.duplicates import ALIKE, CHECKED, NEAREST, candidates, near_duplicates
from medtune.data.splitting.split import TRAIN, Splitter, hash_fraction
from medtune.data.store import SPLITS


@dataclass
class RowKeys:
    """What rows are compared by; all run over the screened rows. `names` are those of the configured sources.

    `groups` is empty where a row names none; `marked` is the split that a row names, below 0 where it names none.
    """

    names: Sequence[str]
    groups: list[str]
    question: np.ndarray
    answer: np.ndarray
    bands: np.ndarray
    marked: np.ndarray


@dataclass
class Selection:
    """`splits` [rows]: the split of a row that is kept. `left_out`: row -> (rule, reason). `groups`: complete."""

    splits: np.ndarray
    left_out: dict[int, tuple[str, str]]
    groups: list[str]


LeftOut = tuple[str, str]  # the rule, and the reason as the user reads it


def select(
    keys: RowKeys, data: Data, texts: Callable[[int], tuple[str, str]], number: Callable[[int], str]
) -> Selection:
    """Decides over every row.

    `texts(i)` gives question and answer of row i, `number(i)` its name for the user.
    """
    selector = Selector(keys, data, texts, number)
    for row in range(len(keys.question)):
        selector.decide(row)
    drop_cross_split_duplicates(selector.selection, keys, texts, number)
    return selector.selection


class Selector:
    """Decides over rows in their order; remembers what it took."""

    def __init__(
        self, keys: RowKeys, data: Data, texts: Callable[[int], tuple[str, str]], number: Callable[[int], str]
    ) -> None:
        """`keys`, `texts` and `number`: see `select`."""
        self.keys, self.rules, self.texts, self.number = keys, data.rules, texts, number
        self.questions, self.answers = keys.question.tolist(), keys.answer.tolist()
        openings = np.sort(np.unique(keys.question, return_index=True)[1])
        self.opening = {self.questions[row]: row for row in openings.tolist()}  # the first row of each question
        self.alike = near_duplicates(keys.bands, openings, lambda row: texts(row)[0])
        self.marked = keys.marked.tolist()
        self.splitter = Splitter(data.validation_size, data.test_size, keys.names, marks_of(keys, data))
        self.selection = Selection(np.full(len(self.questions), TRAIN, np.int8), {}, list(keys.groups))
        self.taken: dict[int, list[int]] = {}  # rows taken so far, by question
        self.pairs: dict[tuple[int, int], int] = {}  # the same, by question and answer
        self.times_answered: Counter[int] = Counter()  # the same, counted by answer

    def decide(self, row: int) -> None:
        """Takes a row into its split, or leaves it out."""
        question, answer = self.questions[row], self.answers[row]
        same, relatives = self.taken.get(question, []), self.relatives(question)
        left_out = (
            self.repeats(row, same, relatives)
            or self.exceeds_limit(answer, same)
            or self.assign_split(row, [*same[:1], *relatives])
        )
        if left_out:
            self.selection.left_out[row] = left_out
            return
        self.pairs[question, answer] = row
        self.taken.setdefault(question, []).append(row)
        self.times_answered[answer] += 1

    def relatives(self, question: int) -> list[int]:
        """Returns the first taken row of each question that is nearly this one."""
        rows = self.alike.get(self.opening[question], [])
        return [self.taken[other][0] for other in (self.questions[row] for row in rows) if other in self.taken]

    def repeats(self, row: int, same: list[int], relatives: list[int]) -> LeftOut | None:
        """Returns whether a row is an earlier one again, to the word or nearly.

        `same`: rows of the same question; `relatives`: see the method.
        """
        pair = self.questions[row], self.answers[row]
        if pair in self.pairs:
            return "duplicates", f"that repeats {self.number(self.pairs[pair])}"
        if self.rules.near_duplicates is None:
            return None
        for other in [*same[-NEAREST:], *relatives]:
            if jaccard(self.texts(row)[1], self.texts(other)[1]) >= self.rules.near_duplicates:
                return "near_duplicates", f"that nearly repeats {self.number(other)}"
        return None

    def exceeds_limit(self, answer: int, same: list[int]) -> LeftOut | None:
        """Returns whether a question has answers enough, or an answer questions. `same`: rows of the same question."""
        most_answers, most_questions = self.rules.answers_per_question, self.rules.questions_per_answer
        if most_answers is not None and len(same) >= most_answers:
            return "answers_per_question", f"that answers the question of {self.number(same[0])} once more"
        if most_questions is not None and self.times_answered[answer] >= most_questions:
            return "questions_per_answer", f"whose answer stands in {most_questions} rows before it"
        return None

    def assign_split(self, row: int, family: list[int]) -> LeftOut | None:
        """Gives a row its group and split, unless the split is full or would leak.

        `family`: taken rows that ask the same or nearly; a row without a group joins that of the first.
        """
        groups, name = self.selection.groups, self.keys.names[row]
        inherited = groups[family[0]] if family else f"question/{self.questions[row]:016x}"
        group = groups[row] or inherited
        marked = self.marked[row]
        split = self.splitter.split_of(group, name, marked)
        if split is None:
            return "split_size", "whose group is in a split that is full"
        if self.splitter.contradicts(marked, split, name):
            return "leaks", f"that are marked {SPLITS[marked]}, while their group is in {SPLITS[split]}"
        for other in family:
            if self.selection.splits[other] != split:
                return "leaks", f"that asks what {self.number(other)} asks, which is in another split"
        groups[row], self.selection.splits[row] = group, split
        self.splitter.take(group, name)
        return None


def marks_of(keys: RowKeys, data: Data) -> dict[str, set[int]]:
    """Returns the held-out splits that each source marks itself; none where all of the data is the test set."""
    marks: dict[str, set[int]] = {}
    for row in np.flatnonzero(keys.marked > TRAIN).tolist() if data.test_size != 1 else []:
        marks.setdefault(keys.names[row], set()).add(int(keys.marked[row]))
    return marks


def drop_cross_split_duplicates(
    selection: Selection, keys: RowKeys, texts: Callable[[int], tuple[str, str]], number: Callable[[int], str]
) -> None:
    """Leaves out later rows that ask nearly what a row of another split asks, where a band was too full to see it."""
    found = True
    while found:
        rows = np.array([row for row in range(len(selection.splits)) if row not in selection.left_out], np.int64)
        pairs = candidates(keys.bands, rows, CHECKED)
        pairs = pairs[selection.splits[pairs[:, 0]] != selection.splits[pairs[:, 1]]]
        found = False
        for later, earlier in pairs.tolist():
            apart = later not in selection.left_out and earlier not in selection.left_out
            if apart and jaccard(texts(later)[0], texts(earlier)[0]) >= ALIKE:
                reason = f"that asks what {number(earlier)} asks, which is in another split"
                selection.left_out[later], found = ("leaks", reason), True


def apply_caps_and_weights(selection: Selection, names: Sequence[str], sources: Sequence[Source]) -> None:
    """Applies caps and weights below 1: groups with the smallest hashes stay, so that a smaller share is in a larger.

    A weight thins the training split only: held-out conversations compare from mixture to mixture.
    """
    for source in sources:
        rows = [i for i, name in enumerate(names) if name == source.name and i not in selection.left_out]
        order = sorted(rows, key=lambda i: hash_fraction(f"{source.name} {selection.groups[i]}"))
        if source.max_conversations is not None:
            for row in order[source.max_conversations :]:
                selection.left_out[row] = ("max_conversations", f"beyond {source.max_conversations} of {source.name}")
        if source.weight < 1:
            for row in order[: source.max_conversations]:
                beyond = hash_fraction(f"{source.name} {selection.groups[row]}") >= source.weight
                if beyond and selection.splits[row] == TRAIN:
                    selection.left_out[row] = ("weight", f"beyond a weight of {source.weight:g} of {source.name}")
