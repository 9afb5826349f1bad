"""What a model said on the test set -> scores of every answer, and means with intervals beside floor and ceiling."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medtune.evaluation.answers import END_OF_TURN
from medtune.evaluation.eval_set import EvalSet
from medtune.evaluation.metrics import facts, fluency, lexical, semantic
from medtune.evaluation.outputs import ModelOutputs
from medtune.results.metrics import METRICS
from medtune.results.statistics import Bootstrap, Estimate
from medtune.runtime.errors import UserError


@dataclass
class Scores:
    """Numbers of single examples: arrays by metric, over the answers to the test questions.

    `floor`: the same with answers shuffled among the questions. `ceiling`: of another doctor's answer; NaN where there
    is none.
    """

    answers: dict[str, np.ndarray]
    floor: dict[str, np.ndarray]
    ceiling: dict[str, np.ndarray]


def score(eval_set: EvalSet, outputs: ModelOutputs, encoder: semantic.Encoder | None) -> Scores:
    """Scores the answers to the test questions; without an encoder those that need one are left out."""
    if not eval_set.answered:
        return Scores({}, {}, {})
    texts = [answer.text for answer in outputs.answers[: len(eval_set.answered)]]
    references = [question.reference for question in eval_set.tested]
    asked = [question.messages[-1]["content"] for question in eval_set.tested]
    found = against_reference(texts, references, encoder)
    if encoder is not None:
        found["reciprocal_rank"] = 1 / semantic.question_ranks(encoder.encode(texts), encoder.encode(asked))
    found["base_nll"] = outputs.fluency.nll
    found["repetition"] = np.array([fluency.repetition(text) for text in texts])
    found["boilerplate"] = fluency.boilerplate(texts)
    found["ended"] = np.array([float(a.stop == END_OF_TURN) for a in outputs.answers[: len(texts)]])
    found["length_ratio"] = fluency.length_ratio(texts, references)
    return Scores(found, floor(eval_set, texts, references, encoder), ceiling(eval_set, references, encoder))


def against_reference(
    texts: Sequence[str], references: Sequence[str], encoder: semantic.Encoder | None
) -> dict[str, np.ndarray]:
    """Scores of texts beside the doctors' answers."""
    found = lexical.scores(texts, references)
    if encoder is not None:
        found["similarity"] = semantic.similarity(encoder.encode(texts), encoder.encode(references))
    pairs = list(zip(texts, references, strict=True))
    found["fact_agreement"] = np.array([facts.agreement(text, reference) for text, reference in pairs])
    found["contradicted"] = np.array([facts.contradicted(text, reference) for text, reference in pairs])
    return found


def floor(
    eval_set: EvalSet, texts: Sequence[str], references: Sequence[str], encoder: semantic.Encoder | None
) -> dict[str, np.ndarray]:
    """Returns what an answer to another group's question scores: a metric that is not far above this sees no
    content.
    """
    found = against_reference([texts[index] for index in shuffled(eval_set.answered_groups)], references, encoder)
    if encoder is not None:
        found["reciprocal_rank"] = np.full(len(texts), semantic.chance_reciprocal_rank(len(texts)))
    return found


def shuffled(groups: Sequence[str]) -> list[int]:
    """Returns for each index another one: half a set away or further, of another group if there is one."""
    return [distant_index(groups, index) for index in range(len(groups))]


def distant_index(groups: Sequence[str], index: int) -> int:
    """Returns the first index of another group, counted from half a set away; that half-way index if there is none."""
    count = len(groups)
    half_way = (index + count // 2) % count
    for step in range(count):
        candidate = (half_way + step) % count
        if groups[candidate] != groups[index]:
            return candidate
    return half_way


def ceiling(eval_set: EvalSet, references: Sequence[str], encoder: semantic.Encoder | None) -> dict[str, np.ndarray]:
    """Returns what another doctor's answer to the same question scores; NaN where the set has none."""
    there = [place for place, text in enumerate(eval_set.others) if text]
    found = (
        against_reference([eval_set.others[p] for p in there], [references[p] for p in there], encoder) if there else {}
    )
    result = {}
    for name, values in found.items():
        result[name] = np.full(len(references), np.nan)
        result[name][there] = values
    return result


def encoder_or_none() -> tuple[semantic.Encoder | None, str]:
    """Returns the sentence encoder, or None and the line that says how to get it."""
    try:
        return semantic.Encoder(), ""
    except UserError as refusal:
        return None, str(refusal)


def estimates(eval_set: EvalSet, outputs: ModelOutputs, scores: Scores, resamples: int) -> dict[str, dict[str, Any]]:
    """Returns for each metric the mean with its interval, floor and ceiling, as JSON values."""
    result: dict[str, dict[str, Any]] = {}
    for name, (values, weights, bootstrap) in metric_columns(eval_set, outputs, scores, resamples).items():
        result[name] = estimate_to_json(bootstrap.ratio(values, weights))
        for bound in ("floor", "ceiling"):
            drawn = getattr(scores, bound).get(name)
            if drawn is not None and np.isfinite(drawn).any():
                result[name][bound] = float(np.nanmean(drawn))
    return result


def differences(
    eval_set: EvalSet, ours: tuple[ModelOutputs, Scores], theirs: tuple[ModelOutputs, Scores], resamples: int
) -> dict[str, dict[str, Any]]:
    """Returns for each metric that has a better and a worse: our mean minus theirs, paired by example, and the word for
    it.
    """
    result = {}
    of_theirs = metric_columns(eval_set, *theirs, resamples)
    for name, (values, weights, bootstrap) in metric_columns(eval_set, *ours, resamples).items():
        higher = METRICS[name].higher_is_better
        if higher is not None:
            estimate = bootstrap.difference(values, of_theirs[name][0], weights)
            result[name] = estimate_to_json(estimate) | {"verdict": estimate.verdict(higher)}
    return result


def metric_columns(
    eval_set: EvalSet, outputs: ModelOutputs, scores: Scores, resamples: int
) -> dict[str, tuple[np.ndarray, np.ndarray | None, Bootstrap]]:
    """Returns each metric's numbers, their weights (target tokens, or none), and how its examples are drawn."""
    rows, answers = Bootstrap(eval_set.groups, resamples), Bootstrap(eval_set.answered_groups, resamples)
    found: dict[str, tuple[np.ndarray, np.ndarray | None, Bootstrap]] = {
        "loss": (outputs.likelihood.nll, outputs.likelihood.tokens, rows),
        "token_accuracy": (outputs.likelihood.correct, outputs.likelihood.tokens, rows),
    }
    if eval_set.answered:
        weights = {"base_nll": outputs.fluency.tokens}
        found |= {n: (scores.answers[n], weights.get(n), answers) for n in METRICS if n in scores.answers}
    return found


def estimate_to_json(estimate: Estimate) -> dict[str, Any]:
    """Returns an estimate as JSON values; null for what is no number."""
    return {name: None if value != value else value for name, value in asdict(estimate).items()}
