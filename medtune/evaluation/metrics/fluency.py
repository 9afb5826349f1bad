"""Answers -> how far each repeats itself, how varied all are together, how much of each is stock, how long each is.

A low perplexity is bought cheaply: a looped phrase and a page of courtesies have one. These numbers stand beside it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from medtune.data.cleaning.boilerplate import BOILERPLATE, END, LONGEST

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
OTHERS = 2  # a sentence that stands in so many other answers, too, is stock

# What else is stock, beside the courtesies that cleaning takes out of training data: an AI that says so, and advice to
# see a doctor that says neither why nor when.
AI = r".*\bas an? (?:ai|artificial intelligence)\b.*|.*\bi(?:'m| am) (?:just |only )?(?:an? ai|not a doctor)\b.*"
ADVISE = "(?:i|we) (?:would |do |strongly )*(?:advise|suggest|recommend)|you (?:should|must|may|can|need to)"
LEAD = f"(?:so|therefore|however|it is (?:always )?(?:best|important)|{ADVISE}|please|kindly|to|you|that|always)"
SEE = "(?:see|consult|contact|visit|talk to|speak (?:to|with)|check with|ask)(?: with)? (?:an?|the|your)"
DOCTOR = "(?:doctor|physician|gp|health ?care (?:provider|professional)|medical professional|clinician|specialist)"
PURPOSE = (
    "for(?: (?:an?|the|any|more|further|proper|medical|accurate|personali[sz]ed|professional|and|correct|evaluation"
    "|examination|diagnosis|treatment|advice|guidance|information|help|assistance|management))+"
)
STOCK = re.compile(
    f"{AI}|(?:{LEAD}[, ]+)*{SEE} (?:own |local |family |nearest |qualified |good )*{DOCTOR}(?: {PURPOSE})?"
)


def words(text: str) -> list[str]:
    """Returns the words of a text, in lower case."""
    return WORD.findall(text.lower())


def repetition(text: str) -> float:
    """Returns the share of a text's word 4-grams that repeat an earlier one: seq-rep-4 of Welleck et al. 2019, on
    words.

    Neural text generation with unlikelihood training. 0 where there is no 4-gram.
    """
    own = words(text)
    grams = list(zip(own, own[1:], own[2:], own[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Returns the different word n-grams of all texts for each word of theirs: distinct-n of Li et al. 2016.

    A diversity-promoting objective function for neural conversation models. 0 where there is no word. It falls as texts
    get more: compare equal numbers of answers only.
    """
    of_texts = [words(text) for text in texts]
    grams = {tuple(own[i : i + n]) for own in of_texts for i in range(len(own) - n + 1)}
    return len(grams) / max(1, sum(map(len, of_texts)))


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text that hold a word, in lower case and without the stop."""
    ends = [0, *map(re.Match.end, END.finditer(text)), len(text)]
    return [s for start, end in pairwise(ends) if words(s := text[start:end].strip(" \n.!?\u2026").lower())]


def stock(sentence: str) -> bool:
    """Returns whether a sentence is a courtesy, says that an AI speaks, or sends to a doctor without saying why or
    when.
    """
    return len(sentence) < LONGEST and bool(BOILERPLATE.fullmatch(sentence) or STOCK.fullmatch(sentence))


def boilerplate(texts: Sequence[str]) -> np.ndarray:
    """Returns the share of each answer's words in sentences that are stock, or that at least two other answers hold,
    too.

    Each text answers another question. 0 where there is no word.
    """
    of_texts = [[(" ".join(words(s)), stock(s)) for s in sentences(text)] for text in texts]
    holders = Counter(sentence for own in of_texts for sentence in {sentence for sentence, _ in own})
    shares = np.zeros(len(texts))
    for place, own in enumerate(of_texts):
        lengths = [sentence.count(" ") + 1 for sentence, _ in own]
        idle = [is_stock or holders[sentence] > OTHERS for sentence, is_stock in own]
        shares[place] = np.dot(lengths, idle) / max(1, sum(lengths))
    return shares


def length_ratio(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Returns the words of each answer for each word of its reference; NaN where the reference has none."""
    pairs = ((len(words(answer)), len(words(reference))) for answer, reference in zip(answers, references, strict=True))
    return np.array([own / expected if expected else np.nan for own, expected in pairs])
