"""Hashes of words: MinHash signatures for near-duplicates, n-grams for benchmarks."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from rensa import RMinHash
from xxhash import xxh3_64_intdigest

from medtune.data.reading.normalize import normalized_words

# MinHash with banding (Broder 1997; Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, 3.4): two questions with
# a Jaccard similarity of s agree in each band with probability s^6.
BANDS, ROWS_PER_BAND = 24, 6


def hash_words(words: Sequence[str]) -> int:
    """Returns a 64-bit hash of words."""
    return xxh3_64_intdigest(" ".join(words).encode())


def pairs_of(words: Sequence[str]) -> list[str]:
    """Returns the neighbouring words, the ends marked: two questions are as alike as these sets."""
    return [f"{a} {b}" for a, b in zip(["^", *words], [*words, "$"], strict=True)]


def jaccard(a: str, b: str) -> float:
    """Returns the Jaccard similarity of two texts' neighbouring words, 0 to 1."""
    ours, theirs = word_pairs(a), word_pairs(b)
    return len(ours & theirs) / len(ours | theirs)


@lru_cache(maxsize=4096)  # a row of a templated set is compared with dozens, one soon after another
def word_pairs(text: str) -> frozenset[str]:
    """Returns the neighbouring words of a text, as a set."""
    return frozenset(pairs_of(normalized_words(text)))


def minhash_bands(sets: Sequence[list[str]]) -> np.ndarray:
    """Returns [sets, BANDS] hashes: sets that are alike agree in at least one of them."""
    signatures = RMinHash.digests_from_token_sets(sets, num_perm=BANDS * ROWS_PER_BAND, seed=1)
    rows = np.array(signatures, np.uint64).reshape(len(sets), BANDS, ROWS_PER_BAND)
    mixed = np.zeros(rows.shape[:2], np.uint64)
    for column in range(ROWS_PER_BAND):  # Knuth's multiplicative hashing; overflow is meant
        mixed = (mixed ^ rows[:, :, column]) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def ngrams(words: Sequence[str], size: int) -> list[int]:
    """Hashes of every `size` words in a row; of all words where there are fewer."""
    return [hash_words(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]
