"""Hashes of words: MinHash signatures for near-duplicates, n-grams for benchmarks."""

from collections.abc import Sequence

import numpy as np
from rensa import RMinHash
from xxhash import xxh3_64_intdigest

from medtune.data.reading.normalize import normalized_words

# MinHash with banding (Broder 1997; Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, 3.4): two questions with
# a Jaccard similarity of s agree in each band with probability s^6.
BANDS, ROWS_PER_BAND = 24, 6


def hash_words(words: Sequence[str]) -> int:
    """64-bit hash of words."""
    return xxh3_64_intdigest(" ".join(words).encode())


def pairs_of(words: Sequence[str]) -> list[str]:
    """Neighbouring words, the ends marked: two questions are as alike as these sets."""
    return [f"{a} {b}" for a, b in zip(["^", *words], [*words, "$"], strict=True)]


def jaccard(a: str, b: str) -> float:
    """Jaccard similarity of two texts' neighbouring words, 0 to 1."""
    ours, theirs = set(pairs_of(normalized_words(a))), set(pairs_of(normalized_words(b)))
    return len(ours & theirs) / len(ours | theirs)


def minhash_bands(sets: Sequence[list[str]]) -> np.ndarray:
    """[sets, BANDS] hashes: sets that are alike agree in at least one of them."""
    signatures = RMinHash.digests_from_token_sets(sets, num_perm=BANDS * ROWS_PER_BAND, seed=1)
    rows = np.array(signatures, np.uint64).reshape(len(sets), BANDS, ROWS_PER_BAND)
    mixed = np.zeros(rows.shape[:2], np.uint64)
    for column in range(ROWS_PER_BAND):  # Knuth's multiplicative hashing; overflow is meant
        mixed = (mixed ^ rows[:, :, column]) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def ngrams(words: Sequence[str], size: int) -> list[int]:
    """Hashes of every `size` words in a row; of all words where there are fewer."""
    return [hash_words(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]
