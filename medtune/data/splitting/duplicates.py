"""What rows look like beside each other -> which ask nearly the same as an earlier one."""

from collections.abc import Callable

import numpy as np

from medtune.data.hashing import jaccard

ALIKE = 0.8  # two questions that are this similar must not be in different splits, whatever is dropped
NEAREST = 10  # earlier members of a band that a row is paired with: templated sets have bands of thousands
CHECKED = 50  # the same, where questions are held against those of another split
AGREEING = 2  # bands in which a pair must meet: 99.3 % of pairs do at a similarity of 0.8, 5 % at 0.5


def candidates(bands: np.ndarray, rows: np.ndarray, nearest: int = NEAREST) -> np.ndarray:
    """Returns pairs (later, earlier) of `rows` that agree in several bands, as an array [pairs, 2] in order.

    `bands`: [all rows, BANDS]. In a band a row is paired with the first member and the last `nearest` before it.
    """
    own = bands[rows]
    found = [np.empty(0, np.int64)]
    for column in range(own.shape[1]):
        order = np.argsort(own[:, column], kind="stable")  # stable: members of a band stay in their order
        values = own[order, column]
        starts = np.r_[True, values[1:] != values[:-1]]
        first = np.maximum.accumulate(np.where(starts, np.arange(len(values)), 0))
        found.append(encoded(order, order[first], len(rows)))
        for step in range(1, nearest + 1):
            same = values[step:] == values[:-step]
            if not same.any():
                break
            found.append(encoded(order[step:][same], order[:-step][same], len(rows)))
    pairs = np.unique(np.concatenate(found))
    later, earlier = pairs // max(len(rows), 1), pairs % max(len(rows), 1)
    agree = np.zeros(len(pairs), np.int64)
    for column in range(own.shape[1]):  # column by column: all at once would take gigabytes
        agree += own[later, column] == own[earlier, column]
    keep = agree >= AGREEING
    return np.stack([rows[later[keep]], rows[earlier[keep]]], axis=1)


def encoded(later: np.ndarray, earlier: np.ndarray, rows: int) -> np.ndarray:
    """Returns pairs as single numbers, without pairs of a row with itself."""
    apart = later != earlier
    return later[apart].astype(np.int64) * rows + earlier[apart]


def near_duplicates(bands: np.ndarray, rows: np.ndarray, question: Callable[[int], str]) -> dict[int, list[int]]:
    """Returns for each of `rows` the earlier ones whose question is at least ALIKE, by the questions' own words."""
    found: dict[int, list[int]] = {}
    for later, earlier in candidates(bands, rows).tolist():
        if jaccard(question(later), question(earlier)) >= ALIKE:
            found.setdefault(later, []).append(earlier)
    return found
