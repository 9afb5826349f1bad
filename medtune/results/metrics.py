"""Answers, and the doctors' they are measured against -> numbers, one per answer. Nothing here knows of a model.

What each number says, and which way is better, is in the table below.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number of a model: its title in tables, what it says, and whether more is better; None where neither is."""

    title: str
    says: str
    higher_is_better: bool | None


METRICS = {
    "loss": Metric("loss", "nats per taught token of the doctor's answer", False),
    "token_accuracy": Metric("token accuracy", "target tokens that are the model's first choice", True),
    "rouge_l": Metric("ROUGE-L", "longest common subsequence with the doctor's answer", True),
    "chrf": Metric("chrF", "character n-grams in common with it", True),
    "bleu": Metric("BLEU", "word n-grams in common with it", True),
    "similarity": Metric("similarity", "cosine to it, by a sentence encoder", True),
    "reciprocal_rank": Metric("question rank", "1 / rank of its own question among all, by that encoder", True),
    "fact_agreement": Metric("key facts", "F1 of numbers, drugs, findings, actions, with their polarity", True),
    "contradicted": Metric("contradicted", "facts in common that one affirms and the other denies", False),
    "base_nll": Metric("perplexity by base", "of the answer, under the base model; loops have little too", None),
    "repetition": Metric("repetition", "4-grams that repeat an earlier one", False),
    "boilerplate": Metric("boilerplate", "words in stock sentences", False),
    "ended": Metric("ended", "answers that end by themselves", True),
    "length_ratio": Metric("length", "words for each word of the doctor's", None),
}


def perplexity(loss: float) -> float:
    """Exponential of a loss in nats per token, finite however large it is."""
    return math.exp(min(loss, 700.0))
