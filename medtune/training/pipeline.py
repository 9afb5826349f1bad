"""One run: shared inputs, adapter, trainer, fit, release, test set. `train` tells the story: read it first."""

import gc
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from medtune.config.schema import RunConfig
from medtune.config.serialize import to_plain
from medtune.evaluation.benchmarks import load_tasks
from medtune.results import checkpoints
from medtune.results.run_folder import RunFolder
from medtune.results.tracking import FileTracker, RunIdentity, Trackers, WandbTracker, require_account
from medtune.runtime.interruption import deferred
from medtune.runtime.logs import FILE_ONLY, silence_libraries
from medtune.runtime.progress import OnProgress, ignore_progress, reporting_to

if TYPE_CHECKING:
    from peft import PeftModel

    from medtune.modeling.multi_lora.handle import BaseHandle
    from medtune.training.callbacks import MetricsCallback
    from medtune.training.shared_inputs import SharedInputs
    from medtune.training.trainer import AdapterTrainer

log = logging.getLogger(__name__)


@dataclass
class Membership:
    """What a sweep gives to one of its members. A run of its own has none of it.

    `inputs`: the data and the base model that members share. `handle`: the way to the base, where members train
    together. `pause_at`: the optimizer step after which to stop for now. `on_progress`: takes fields of
    `MemberProgress` by name.
    """

    inputs: "SharedInputs | None" = None
    handle: "BaseHandle | None" = None
    pause_at: int | None = None
    on_progress: OnProgress = ignore_progress


def train(run: RunConfig, out: Path, membership: Membership | None = None) -> float:
    """Trains one adapter into the result folder `out` and returns its best validation loss (nats per target token).

    Resumes an unfinished run in `out` from its newest complete checkpoint. The result equals an uninterrupted run.

    Raises `UserError` for the user's mistakes, `RunPaused` at `pause_at`, and `RunFailed` for anything else. The reason
    is recorded in run.json. An interruption saves a checkpoint and marks the run.
    """
    membership = membership or Membership()
    with RunFolder(run, out) as folder, deferred(), reporting_to(membership.on_progress), clear_memory_errors():
        # What is cheap to refuse comes first: the account, the data, the memory, the mask.
        inputs = membership.inputs or prepare_inputs(run)
        parts = Parts(run, folder, inputs, membership.on_progress)
        record_inputs(parts)
        inputs.baseline(run)  # the base model's scores, before an adapter is near it
        parts.handle = membership.handle or exclusive_handle(parts)
        # The adapter comes last, right after seeding: a member of a sweep equals the same run alone.
        model = attach_adapter(parts)
        saved = checkpoints.latest_complete(out / "checkpoints")
        with open_trackers(parts, saved) as trackers:
            trainer, metrics_callback = build(parts, model, trackers)
            trainer.pause_at = membership.pause_at
            initial = adapter_fingerprint(model)
            trainer.run(saved)
            if parts.handle:
                parts.handle.release()  # saving and evaluating need the memory
            save_adapter(parts, model)
            record_change(parts, initial != adapter_fingerprint(model))
            metrics = metrics_callback.metrics()
            trackers.summarize(metrics)
            if run.eval.final:
                evaluate_on_test_set(parts, model, trackers)
    return metrics["best"]["eval_loss"]


@dataclass
class Parts:
    """What the steps of one run work with."""

    run: RunConfig
    folder: RunFolder
    inputs: "SharedInputs"
    on_progress: OnProgress
    handle: "BaseHandle | None" = None

    @cached_property
    def checkpointing(self) -> bool:
        """Whether training recomputes activations."""
        from medtune.modeling.memory import needs_checkpointing

        return self.handle.checkpointing if self.handle else needs_checkpointing(self.run, self.inputs.base)


def prepare_inputs(run: RunConfig) -> "SharedInputs":
    """Prepares the data and loads the base model. Raises `UserError`."""
    require_account(run.wandb.mode)
    if run.eval.final and run.eval.benchmarks:
        load_tasks(run.eval.benchmarks)  # missing benchmark data would otherwise show after hours of training
    from medtune.data import funnel
    from medtune.data.prepared import prepare

    conversations = prepare(run.data)
    funnel.log_report(conversations.report)
    silence_libraries()
    # These imports take ten seconds: they wait until the data is known to be good.
    from medtune.modeling.memory import tune_malloc
    from medtune.training.shared_inputs import load_shared_inputs

    gc.freeze()  # the modules stay: looking them over at the end of the process would take another second
    tune_malloc()
    return load_shared_inputs(run, conversations)


def record_inputs(parts: Parts) -> None:
    """Writes what the run trains on: rejected rows, hashes of the questions, and the metadata in run.json."""
    from medtune.data.splitting.question_hashes import write_questions

    inputs, out = parts.inputs, parts.folder.out
    data = inputs.data
    shutil.copyfile(data.rejects, out / "rejects.jsonl")
    inputs.tokens.record(out / "rejects.jsonl")
    write_questions([data.train, data.validation], out / "trained_on.parquet")
    parts.folder.record(inputs.metadata(parts.run))


def exclusive_handle(parts: Parts) -> "BaseHandle | None":
    """Returns the handle of a run that has a GPU's base model to itself; None on a CPU, where the stock layers are as
    fast.
    """
    from medtune.modeling.attention import train_attention
    from medtune.modeling.multi_lora.exclusive import ExclusiveHandle

    base, run = parts.inputs.base, parts.run
    if base.device.type != "cuda":
        return None
    attention = train_attention(run.model, run.trainer.max_length, base.device)
    return ExclusiveHandle(base, parts.checkpointing, attention, parts.inputs.tokens.longest)


def attach_adapter(parts: Parts) -> "PeftModel":
    """Attaches a new adapter to a view of the base model."""
    from medtune.modeling.forwards import describe_forwards
    from medtune.modeling.frozen_base import share_weights
    from medtune.modeling.lora import adapter
    from medtune.modeling.memory import reset_peak_memory

    reset_peak_memory()
    view = parts.handle.view() if parts.handle else share_weights(parts.inputs.base)
    model = adapter.add_lora(view, parts.run.lora, parts.run.seed)
    trained, total = adapter.trainable_parameters(model)
    counts = {"trainable_parameters": trained, "total_parameters": total}
    parts.folder.record(counts | {"checkpointing": parts.checkpointing})
    log.info(
        "loss on target tokens only, batches %s, %s gradient checkpointing",
        "grouped by length" if parts.run.trainer.group_by_length else "in the order drawn",
        "with" if parts.checkpointing else "no",
    )
    log.info("adapter: %s of %s parameters train (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    log.info("which forward each kind of layer runs:\n%s", describe_forwards(model), extra=FILE_ONLY)
    return model


def open_trackers(parts: Parts, saved: checkpoints.Saved | None) -> Trackers:
    """Opens the trackers of a run, which resumes from the checkpoint `saved` if there is one."""
    run, out = parts.run, parts.folder.out
    identity = RunIdentity(out.name, f"{run.name}/{out.parent.name}", parts.folder.metadata["started"], to_plain(run))
    trackers = Trackers(FileTracker(out, saved), WandbTracker(out, run.wandb, identity))
    trackers.summarize({f"data/{name}": count for name, count in parts.inputs.data.report["funnel"].items()})
    return trackers


def build(parts: Parts, model: "PeftModel", trackers: Trackers) -> "tuple[AdapterTrainer, MetricsCallback]":
    """Builds the trainer, and the callback that collects its metrics."""
    from medtune.training.callbacks import Audience, MetricsCallback
    from medtune.training.trainer import TrainingData, build_trainer

    inputs, out = parts.inputs, parts.folder.out
    run = replace(parts.run, trainer=replace(parts.run.trainer, gradient_checkpointing=parts.checkpointing))
    audience = Audience(trackers, out / "metrics.json", parts.on_progress)
    baseline = inputs.baseline(run)
    callback = MetricsCallback(audience, inputs.tokenizer, inputs.questions(run), baseline.answers, run.eval)
    data = TrainingData(inputs.tokenizer, inputs.tokens, baseline.likelihood)
    trainer = build_trainer(model, data, run, out / "checkpoints", [callback])
    trainer.handle = parts.handle
    return trainer, callback


def save_adapter(parts: Parts, model: "PeftModel") -> None:
    """Saves the best adapter, after proving that the base model did not change.

    Raises `Changed` otherwise, and removes the checkpoints: they belong to another base model.
    """
    from medtune.modeling.lora import adapter
    from medtune.training.shared_inputs import Changed

    inputs, out = parts.inputs, parts.folder.out
    try:
        inputs.require_unchanged()
    except Changed:
        shutil.rmtree(out / "checkpoints")
        raise
    adapter.save_verified(model, inputs.tokenizer, out / "adapter", inputs.tokens.validation[0]["input_ids"])


def adapter_fingerprint(model: "PeftModel") -> str:
    """Returns a name for the weights of an adapter."""
    from medtune.modeling.lora import adapter

    return adapter.fingerprint(model)


def record_change(parts: Parts, changed: bool) -> None:
    """Records whether training changed the adapter at all, and says so where it did not."""
    parts.folder.record({"adapter_changed": changed})
    if not changed:
        log.warning(
            "the saved adapter is the one that training began with: no step changed it. Raise trainer.max_steps, "
            "trainer.num_train_epochs or trainer.learning_rate"
        )


@contextmanager
def clear_memory_errors() -> Iterator[None]:
    """Explains errors of a full memory, once the library that raises them is loaded."""
    try:
        yield
    except Exception:
        from medtune.modeling.memory import explained_memory_errors

        with explained_memory_errors():
            raise


def evaluate_on_test_set(parts: Parts, model: "PeftModel", trackers: Trackers) -> None:
    """Evaluates the saved adapter on the test set. An error here is recorded and costs no trained adapter."""
    from medtune.evaluation.pipeline import evaluate_adapter

    inputs, folder = parts.inputs, parts.folder
    try:
        eval_set = inputs.eval_set(parts.run)
        if eval_set is None:
            log.warning("the test set is empty: nothing is evaluated on it")
            return
        subject = inputs.subject(model, folder.out / "adapter")
        section = evaluate_adapter(subject, eval_set, parts.run.eval, folder.out, folder.out / ".evaluation")
        trackers.summarize({"test": section})
    except Exception as error:
        folder.metadata["test_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        log.error("the adapter is saved, but its evaluation failed: %s", folder.metadata["test_error"])
        log.error("traceback", exc_info=error, extra=FILE_ONLY)
