"""Whether a text is in English: some rules know no other language, and step aside for others."""

from collections.abc import Sequence

# Frequent in any English text, and no words of other languages in Latin letters.
ENGLISH = frozenset((
    "the", "and", "you", "your", "that", "with", "this", "if", "it", "are", "has", "should", "from", "what", "when",
    "there", "they", "which", "been", "would", "may", "now", "think", "please", "hello", "take", "how", "who", "why",
    "could", "does", "did", "because", "after", "before", "about", "some", "more", "than", "then", "his", "see", "feel",
    "feeling", "need", "get", "having", "being", "we", "our", "us", "don't", "i'm", "i've", "i'll", "i'd", "it's",
))  # fmt: skip
LOOKED_AT = 60  # words: a language shows in a few
FEWEST = 0.05  # of the words; in plain English these are a quarter


def is_english(words: Sequence[str]) -> bool:
    """Returns whether a text is in English, by its words in lower case; a few words alone may be in any language."""
    words = words[:LOOKED_AT]
    found = sum(map(ENGLISH.__contains__, words))
    return found > 0 and found >= FEWEST * len(words)
