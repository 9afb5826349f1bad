"""Answers and their references -> ROUGE-L, chrF and BLEU of each pair, through `evaluate`, without a hub.

Shared words say little of an answer: none of the three sees a "not", and BLEU hardly tells one question's doctors from
another's.
"""

import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np


def metrics() -> Any:
    """Returns the three metrics as one module of `evaluate`, whose own `load` would ask the hub for each."""
    import evaluate
    from datasets import Features, Value
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    class Pairs(evaluate.Metric):
        """A score for each pair of texts, instead of one for all."""

        key: str
        scorer: Any

        def _info(self) -> evaluate.MetricInfo:
            texts = Features({"predictions": Value("string"), "references": Value("string")})
            return evaluate.MetricInfo(description=str(self.__doc__), citation="", features=texts)

        def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
            return {self.key: [self.score(*pair) for pair in zip(predictions, references, strict=True)]}

        def score(self, answer: str, reference: str) -> float:
            """Returns what an answer scores against its reference, as sacrebleu's metrics do it."""
            return self.scorer.sentence_score(answer, [reference]).score

    class RougeL(Pairs):
        """F1 of the longest common subsequence of stems, 0 to 1 (Lin 2004)."""

        key, scorer = "rouge_l", RougeScorer(["rougeL"], use_stemmer=True)

        def score(self, answer: str, reference: str) -> float:
            return self.scorer.score(reference, answer)["rougeL"].fmeasure

    class ChrF(Pairs):
        """F2 of character 1- to 6-grams, 0 to 100 (Popović 2015)."""

        key, scorer = "chrf", CHRF()

    class Bleu(Pairs):
        """BLEU, 0 to 100 (Papineni et al. 2002), without the orders of n-grams that an answer is too short for."""

        key, scorer = "bleu", BLEU(effective_order=True)

    # It makes its folder even where all stays in memory; the default is under HOME, which may not be writable.
    folder = tempfile.mkdtemp(prefix="medtune-metrics-")
    try:
        made = [metric(keep_in_memory=True, cache_dir=folder) for metric in (RougeL, ChrF, Bleu)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return evaluate.combine(made)


def scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns `rouge_l` (0 to 1), `chrf` and `bleu` (0 to 100) of each pair, as rouge_score and sacrebleu give them.

    An empty answer scores 0. Raises ValueError where there are not as many answers as references.
    """
    found = metrics().compute(predictions=list(answers), references=list(references))
    return {name: np.array(values) for name, values in found.items()}
