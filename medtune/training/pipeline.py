"""One run: shared inputs, adapter, trainer, fit, test set, result folder."""

import gc
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from medtune.config.schema import RunConfig
from medtune.config.serialize import to_plain
from medtune.evaluation.benchmarks import load_tasks
from medtune.results import checkpoints
from medtune.results.run_folder import RunFolder
from medtune.results.tracking import Tracker, require_account
from medtune.runtime.interruption import deferred
from medtune.runtime.logs import FILE_ONLY, silence_libraries

if TYPE_CHECKING:
    from peft import PeftModel

    from medtune.modeling.multi_lora.handle import BaseHandle
    from medtune.training.shared_inputs import SharedInputs

log = logging.getLogger(__name__)


def train(
    run: RunConfig,
    out: Path,
    inputs: "SharedInputs | None" = None,
    handle: "BaseHandle | None" = None,
    pause_at: int | None = None,
    on_progress: Callable[..., None] = lambda **values: None,
) -> float:
    """Train one adapter into the result folder `out` and return its best validation loss (nats per taught token).

    A folder that holds the same run, unfinished, is gone on with from its newest complete checkpoint, and ends as if
    nothing had happened. `inputs`: the data and the base, shared by the members of a sweep; a single run builds its
    own. `handle`: the member's place in a pack. `pause_at`: the optimizer step after which to stop for now.
    `on_progress`: told how far it is.

    The order matters: what is cheap to refuse comes first, and the adapter is attached last, right after seeding.
    Raises `Refusal` for the user's mistakes, `Paused`, and `Failure` for anything else, recorded in run.json; on an
    interruption the run is marked and saved.
    """
    with RunFolder(run, out) as result, deferred():
        inputs = inputs or prepare_inputs(run)
        from medtune.data.splitting.question_hashes import write_questions
        from medtune.modeling.attention import train_attention
        from medtune.modeling.frozen_base import share_weights
        from medtune.modeling.lora import adapter
        from medtune.modeling.memory import needs_checkpointing, reset_peak_memory
        from medtune.modeling.multi_lora.exclusive import ExclusiveHandle
        from medtune.training.callbacks import MetricsCallback
        from medtune.training.trainer import build_trainer

        conversations, tokenizer, tokens = inputs.conversations, inputs.tokenizer, inputs.tokens
        shutil.copyfile(conversations.rejects, out / "rejects.jsonl")
        tokens.record(out / "rejects.jsonl")
        write_questions([conversations.train, conversations.validation], out / "trained_on.parquet")
        result.record(inputs.metadata(run))
        baseline = inputs.baseline(run)

        reset_peak_memory()
        base = inputs.base
        if handle is None and base.device.type == "cuda":
            attention = train_attention(run.model, run.trainer.max_length, base.device)
            handle = ExclusiveHandle(base, needs_checkpointing(run, base), attention, tokens.longest)
        tuned = adapter.add_lora(handle.view() if handle else share_weights(base), run.lora, run.seed)
        trained, total = adapter.trainable_parameters(tuned)
        checkpointing = handle.checkpointing if handle else needs_checkpointing(run, base)
        result.record({"trainable_parameters": trained, "total_parameters": total, "checkpointing": checkpointing})
        log.info(
            "speed: loss on taught positions only, %s, activations %s",
            "rows of like length together" if run.trainer.group_by_length else "rows as drawn",
            "recomputed (gradient checkpointing)" if checkpointing else "kept",
        )
        log.info("adapter: %s of %s parameters train (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)

        saved = checkpoints.latest_complete(out / "checkpoints")
        member, sweep = out.name, f"{run.name}/{out.parent.name}"
        started = result.metadata["started"]
        with Tracker(out, run.wandb, member, sweep, to_plain(run), saved, started) as tracker:
            report = MetricsCallback(
                tracker, tokenizer, inputs.questions(run), baseline.answers, run.eval, out / "metrics.json", on_progress
            )
            trainer = build_trainer(
                tuned, tokenizer, tokens, run, out / "checkpoints", [report], baseline.likelihood, checkpointing
            )
            trainer.pause_at = pause_at
            trainer.handle = handle
            tracker.summarize({f"data/{name}": count for name, count in conversations.report["funnel"].items()})
            trainer.run(saved)
            if handle:
                handle.release()  # what follows needs the memory
            try:
                inputs.require_unchanged()
            except Exception:
                shutil.rmtree(out / "checkpoints")  # they were trained on it
                raise
            adapter.save_verified(tuned, tokenizer, out / "adapter", tokens.validation[0]["input_ids"])
            metrics = report.metrics()
            tracker.summarize(metrics)
            if run.eval.final:
                evaluate_on_test_set(tuned, inputs, run, result, tracker)
    return metrics["best"]["eval_loss"]


def prepare_inputs(run: RunConfig) -> "SharedInputs":
    """Prepare the data and load the base; what is cheap to refuse first. Raises `Refusal`."""
    require_account(run.wandb.mode)
    if run.eval.final and run.eval.benchmarks:
        load_tasks(run.eval.benchmarks)  # their data: not after hours of training
    from medtune.data import funnel
    from medtune.data.prepared import prepare

    conversations = prepare(run.data)
    funnel.log_report(conversations.report)
    silence_libraries()
    # Importing these takes ten seconds: not before the data is known to be good.
    from medtune.modeling.memory import tune_malloc
    from medtune.training.shared_inputs import load_shared_inputs

    gc.freeze()  # they stay: looking them over at the end of the process would take another second
    tune_malloc()
    return load_shared_inputs(run, conversations)


def evaluate_on_test_set(
    tuned: "PeftModel", inputs: "SharedInputs", run: RunConfig, result: RunFolder, tracker: Tracker
) -> None:
    """Measure the kept adapter on the test set. What goes wrong here is recorded, and costs no trained adapter."""
    from medtune.evaluation.pipeline import evaluate_adapter

    exam = inputs.examination(run)
    if exam is None:
        log.warning("the test set is empty: nothing is measured on it")
        return
    out, tokenizer, fingerprint = result.out, inputs.tokenizer, inputs.fingerprint
    try:
        section = evaluate_adapter(
            tuned, tokenizer, exam, run.eval, fingerprint, out / "adapter", out, out / ".evaluation"
        )
        tracker.summarize({"test": section})
    except Exception as error:
        result.metadata["test_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        log.error("the adapter is saved, but could not be measured on the test set: %s", result.metadata["test_error"])
        log.error("traceback", exc_info=error, extra=FILE_ONLY)
