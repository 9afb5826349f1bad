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


@dataclass
class RowKeys:
    """What rows are compared by; all run over the screened rows. `names` are those of the configured sources.

    `groups` is empty where a row names none.
    """

    names: Sequence[str]
    groups: list[str]
    question: np.ndarray
    answer: np.ndarray
    bands: np.ndarray


@dataclass
class Selection:
    """`splits` [rows]: the split of a row that is kept. `left_out`: row -> (rule, reason). `groups`: complete."""

    splits: np.ndarray
    left_out: dict[int, tuple[str, str]]
    groups: list[str]


def select(
    keys: RowKeys, data: Data, texts: Callable[[int], tuple[str, str]], number: Callable[[int], str]
) -> Selection:
    """Decide over every row.

    `texts(i)` gives question and answer of row i, `number(i)` its name for the user.
    """
    rules, rows = data.rules, len(keys.question)
    first = np.unique(keys.question, return_index=True)[1]
    alike = near_duplicates(keys.bands, np.sort(first), lambda i: texts(i)[0])
    splitter = Splitter(data.validation_size, data.test_size, keys.names)
    selection = Selection(np.full(rows, TRAIN, np.int8), {}, list(keys.groups))
    kept: dict[int, list[int]] = {}  # rows taken so far, by question
    opening: dict[int, int] = {}  # the first row of each question
    pairs: dict[tuple[int, int], int] = {}
    answers: Counter[int] = Counter()

    def verdict(row: int, question: int, answer: int) -> tuple[str, str] | None:
        if (question, answer) in pairs:
            return "duplicates", f"that repeats {number(pairs[question, answer])}"
        same = kept.get(question, [])
        relatives = [kept[q][0] for q in map(int, keys.question[alike.get(opening[question], [])]) if q in kept]
        if rules.near_duplicates is not None:
            for other in [*same[-NEAREST:], *relatives]:
                if jaccard(texts(row)[1], texts(other)[1]) >= rules.near_duplicates:
                    return "near_duplicates", f"that nearly repeats {number(other)}"
        if rules.answers_per_question is not None and len(same) >= rules.answers_per_question:
            return "answers_per_question", f"that answers the question of {number(same[0])} once more"
        if rules.questions_per_answer is not None and answers[answer] >= rules.questions_per_answer:
            return "questions_per_answer", f"whose answer stands in {rules.questions_per_answer} rows before it"
        family = [*same[:1], *relatives]
        group = selection.groups[row] or (selection.groups[family[0]] if family else f"question/{question:016x}")
        split = splitter.split_of(group, keys.names[row])
        if split is None:
            return "split_size", "whose group is in a split that is full"
        for other in family:
            if selection.splits[other] != split:
                return "leaks", f"that asks what {number(other)} asks, which is in another split"
        selection.groups[row], selection.splits[row] = group, split
        splitter.take(group, keys.names[row])
        return None

    for row, (question, answer) in enumerate(zip(keys.question.tolist(), keys.answer.tolist(), strict=True)):
        opening.setdefault(question, row)
        out = verdict(row, question, answer)
        if out:
            selection.left_out[row] = out
            continue
        pairs[question, answer] = row
        kept.setdefault(question, []).append(row)
        answers[answer] += 1
    drop_cross_split_duplicates(selection, keys, texts, number)
    return selection


def drop_cross_split_duplicates(
    selection: Selection, keys: RowKeys, texts: Callable[[int], tuple[str, str]], number: Callable[[int], str]
) -> None:
    """Leave out later rows that ask nearly what a row of another split asks, where a band was too full to see it."""
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
    """Apply caps and weights below 1: groups with the smallest hashes stay, so that a smaller share is in a larger.

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
                if (
                    selection.splits[row] == TRAIN
                    and hash_fraction(f"{source.name} {selection.groups[row]}") >= source.weight
                ):
                    selection.left_out[row] = ("weight", f"beyond a weight of {source.weight:g} of {source.name}")
