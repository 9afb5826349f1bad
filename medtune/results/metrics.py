"""What every number in metrics.json means, and which way is better."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric: its title in tables, what it says, and whether higher is better (None where neither way is)."""

    title: str
    says: str
    higher_is_better: bool | None


METRICS = {
    "loss": Metric("loss", "nats per target token of the doctor's answer", False),
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
    """Returns the exponential of a loss in nats per token, finite for any finite loss."""
    return math.exp(min(loss, 700.0))
