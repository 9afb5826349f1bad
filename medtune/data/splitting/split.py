"""Groups -> train, validation and test, so that adding rows never moves an old one; and a report of what leaks."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from medtune.data.hashing import jaccard
from medtune.data.splitting.duplicates import ALIKE, CHECKED, candidates

TRAIN, VALIDATION, TEST = range(3)
RESERVED = 0.25  # share of the groups that a split of a fixed count is filled from


class Splitter:
    """Assigns whole groups by the hash of their name.

    A size up to 1 is the share of groups, in every source alike, as each group is hashed on its own. A test size of 1
    takes every group, whatever the validation size. Above 1 a size is a number of conversations, shared equally among
    the configured sources and filled by their first groups whose hash falls into a reserved quarter; what such a group
    has beyond the number has no place, because groups are never cut. Either way the place of a row depends on nothing
    that comes after it.

    A held-out split that a source marks itself takes the rows so marked, whatever its size, and no others.
    """

    def __init__(
        self, validation_size: float, test_size: float, sources: Iterable[str], marks: Mapping[str, Set[int]]
    ) -> None:
        """`marks`: the held-out splits that a source marks itself."""
        self.marks = marks
        self.sizes = split_sizes(validation_size, test_size)
        names = sorted(set(sources))
        self.quotas = {
            (split, name): size // len(names) + (rank < size % len(names))
            for split, size in self.sizes.items()
            for rank, name in enumerate(names)
            if size > 1 and split not in marks.get(name, ())
        }
        self.splits: dict[str, int] = {}
        self.filled: Counter[tuple[int, str]] = Counter()  # conversations by split and source

    def split_of(self, group: str, source: str, marked: int) -> int | None:
        """Returns the split for a row of `source` in a group, `marked` with a split or below 0; None where that
        split is full.
        """
        if group not in self.splits:
            itself = marked in self.marks.get(source, ())
            self.splits[group] = marked if itself else self.decide(group, source)
        split = self.splits[group]
        return None if self.full(split, source) else split

    def contradicts(self, marked: int, split: int, source: str) -> bool:
        """Returns whether a row's mark and the split of its group are not the same."""
        own = self.marks.get(source, ())
        return marked >= 0 and marked != split and (marked in own or split in own)

    def take(self, group: str, source: str) -> None:
        """Tells that a row of `source` was taken into the split of its group."""
        self.filled[self.splits[group], source] += 1

    def full(self, split: int, source: str) -> bool:
        return (split, source) in self.quotas and self.filled[split, source] >= self.quotas[split, source]

    def decide(self, group: str, source: str) -> int:
        place, start = hash_fraction(group), 0.0
        for split, size in self.sizes.items():
            width = size if size <= 1 else RESERVED
            if start <= place < start + width and split not in self.marks.get(source, ()):
                return TRAIN if self.full(split, source) else split
            start += width
        return TRAIN


def split_sizes(validation_size: float, test_size: float) -> dict[int, float]:
    """Returns the size of each held-out split. Where all of the data is the test set, none is left to validate on."""
    return {VALIDATION: 0.0 if test_size == 1 else validation_size, TEST: test_size}


def hash_fraction(name: str) -> float:
    """Returns a number from 0 to 1 that depends on the name alone."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass
class Leakage:
    """Held-out conversations (validation and test) whose question, exactly or nearly, or group is in another split too.

    The last two: what share would leak if rows were drawn at random instead, as most pipelines do.
    """

    held_out: int
    exact_questions: int
    near_questions: int
    groups: int
    examples: list[tuple[int, int]]
    questions_if_split_by_row: float
    groups_if_split_by_row: float

    @property
    def share(self) -> float:
        """Share of the held-out conversations whose question is elsewhere too."""
        return (self.exact_questions + self.near_questions) / max(self.held_out, 1)


def leakage(
    splits: np.ndarray,
    question: np.ndarray,
    groups: Sequence[str],
    bands: np.ndarray,
    text: Callable[[int], str],
    size: float,
) -> Leakage:
    """Looks for leaks in a finished split, independently of how it was made.

    `splits`, `question` and `groups` run over the rows kept; `text(i)` is the question of row i; `size` is the share of
    the rows that the random split of comparison would hold out.
    """
    codes = np.unique(np.array(groups, object).astype(str), return_inverse=True)[1]
    held_out = np.flatnonzero(splits != TRAIN)
    exact = elsewhere(question, splits)
    pairs = candidates(bands, np.arange(len(splits)), CHECKED)
    pairs = pairs[(splits[pairs[:, 0]] != splits[pairs[:, 1]]) & (question[pairs[:, 0]] != question[pairs[:, 1]])]
    across = [(a, b) if splits[a] > splits[b] else (b, a) for a, b in pairs.tolist()]
    alike = [(a, b) for a, b in across if jaccard(text(a), text(b)) >= ALIKE]
    near = {a for a, _ in alike if not exact[a]}
    at_random = (np.random.default_rng(0).random(len(splits)) < size).astype(np.int8)
    drawn = max(int(at_random.sum()), 1)
    return Leakage(
        held_out=len(held_out),
        exact_questions=int(exact[held_out].sum()),
        near_questions=len(near),
        groups=int(elsewhere(codes, splits)[held_out].sum()),
        examples=alike[:5],
        questions_if_split_by_row=float(elsewhere(question, at_random)[at_random == 1].sum() / drawn),
        groups_if_split_by_row=float(elsewhere(codes, at_random)[at_random == 1].sum() / drawn),
    )


def elsewhere(values: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Returns for each row whether its value stands in an earlier split too (train before validation before test)."""
    _, codes = np.unique(values, return_inverse=True)
    first = np.full(codes.max(initial=-1) + 1, np.iinfo(np.int8).max)
    np.minimum.at(first, codes, splits)
    return first[codes] < splits
