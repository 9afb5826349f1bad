"""Train one adapter: data -> tokenizer -> base -> adapter -> trainer -> result folder.

python -m medtune.train                     one run on the embedded default
python -m medtune.train lora.r=16,32 -m     a sweep
"""

import gc
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from medtune import checkpoints
from medtune.benchmark import load_tasks
from medtune.checks import typed
from medtune.command_line import command
from medtune.config import Run
from medtune.interruption import deferred
from medtune.logs import FILE_ONLY
from medtune.progress import Progress
from medtune.quiet import quiet_libraries
from medtune.result import Result, plain
from medtune.tracking import Tracker, require_account

if TYPE_CHECKING:
    from peft import PeftModel

    from medtune.foundation import Foundation
    from medtune.sweep.alone import Alone
    from medtune.sweep.pack import Lane

log = logging.getLogger(__name__)


def train(
    run: Run,
    out: Path,
    foundation: "Foundation | None" = None,
    lane: "Lane | Alone | None" = None,
    pause_at: int | None = None,
    watch: Callable[..., None] = lambda **values: None,
) -> float:
    """Train one adapter into the result folder `out` and return its best validation loss (nats per taught token).

    A folder that holds the same run, unfinished, is gone on with from its newest complete checkpoint, and ends as if
    nothing had happened. `foundation`: the data and the base, shared by the members of a sweep; a single run builds its
    own. `lane`: the member's place in a pack. `pause_at`: the optimizer step after which to stop for now. `watch`: told
    how far it is.

    The order matters: what is cheap to refuse comes first, and the adapter is attached last, right after seeding.
    Raises `Refusal` for the user's mistakes, `Paused`, and `Failure` for anything else, recorded in run.json; on an
    interruption the run is marked and saved.
    """
    with Result(run, out) as result, deferred():
        foundation = foundation or lay_foundation(run)
        from medtune import adapter, frozen, model
        from medtune.data.questions import write_questions
        from medtune.memory import needs_checkpointing
        from medtune.report import Report, reset_peak_memory
        from medtune.sweep.alone import Alone
        from medtune.trainer import build_trainer

        conversations, tokenizer, tokens = foundation.conversations, foundation.tokenizer, foundation.tokens
        shutil.copyfile(conversations.rejects, out / "rejects.jsonl")
        tokens.record(out / "rejects.jsonl")
        write_questions([conversations.train, conversations.validation], out / "trained_on.parquet")
        result.record(foundation.facts(run))
        untuned = foundation.untuned(run)

        reset_peak_memory()
        base = foundation.base
        if lane is None and base.device.type == "cuda":
            attention = model.training_kernel(run.model, run.trainer.max_length, base.device)
            lane = Alone(base, needs_checkpointing(run, base), attention, tokens.longest)
        tuned = adapter.attach(lane.view() if lane else frozen.view(base), run.lora, run.seed)
        trained, total = adapter.trainable_parameters(tuned)
        checkpointing = lane.checkpointing if lane else needs_checkpointing(run, base)
        result.record({"trainable_parameters": trained, "total_parameters": total, "checkpointing": checkpointing})
        log.info(
            "speed: loss on taught positions only, %s, activations %s",
            "rows of like length together" if run.trainer.group_by_length else "rows as drawn",
            "recomputed (gradient checkpointing)" if checkpointing else "kept",
        )
        log.info("adapter: %s of %s parameters train (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)

        saved = checkpoints.newest(out / "checkpoints")
        member, sweep = out.name, f"{run.name}/{out.parent.name}"
        started = result.facts["started"]
        with Tracker(out, run.wandb, member, sweep, plain(run), saved, started) as tracker:
            report = Report(
                tracker, tokenizer, foundation.questions(run), untuned.answers, run.eval, out / "metrics.json", watch
            )
            trainer = build_trainer(
                tuned, tokenizer, tokens, run, out / "checkpoints", [report], untuned.likelihood, checkpointing
            )
            trainer.pause_at = pause_at
            trainer.place = lane
            tracker.summarize({f"data/{name}": count for name, count in conversations.report["funnel"].items()})
            trainer.run(saved)
            if isinstance(lane, Alone):
                lane.trunk.forget()  # what follows needs the memory
            try:
                foundation.require_unchanged()
            except Exception:
                shutil.rmtree(out / "checkpoints")  # they were trained on it
                raise
            adapter.release(tuned, tokenizer, out / "adapter", tokens.validation[0]["input_ids"])
            metrics = report.metrics()
            tracker.summarize(metrics)
            if run.eval.final:
                test(tuned, foundation, run, result, tracker)
    return metrics["best"]["eval_loss"]


def lay_foundation(run: Run) -> "Foundation":
    """Prepare the data and load the base; what is cheap to refuse first. Raises `Refusal`."""
    require_account(run.wandb.mode)
    if run.eval.final and run.eval.benchmarks:
        load_tasks(run.eval.benchmarks)  # their data: not after hours of training
    from medtune.data import funnel, prepare

    conversations = prepare(run.data)
    funnel.announce(conversations.report)
    quiet_libraries()
    # Importing these takes ten seconds: not before the data is known to be good.
    from medtune.foundation import lay
    from medtune.memory import keep_freed_memory

    gc.freeze()  # they stay: looking them over at the end of the process would take another second
    keep_freed_memory()
    return lay(run, conversations)


def test(tuned: "PeftModel", foundation: "Foundation", run: Run, result: Result, tracker: Tracker) -> None:
    """Measure the kept adapter on the test set. What goes wrong here is recorded, and costs no trained adapter."""
    from medtune.assessment import assess

    exam = foundation.examination(run)
    if exam is None:
        log.warning("the test set is empty: nothing is measured on it")
        return
    out, tokenizer, fingerprint = result.out, foundation.tokenizer, foundation.fingerprint
    try:
        section = assess(tuned, tokenizer, exam, run.eval, fingerprint, out / "adapter", out, out / ".evaluation")
        tracker.summarize({"test": section})
    except Exception as error:
        result.facts["test_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        log.error("the adapter is saved, but could not be measured on the test set: %s", result.facts["test_error"])
        log.error("traceback", exc_info=error, extra=FILE_ONLY)


def run_member(cfg: DictConfig) -> float:
    """Hydra's task: one run, or one member of a sweep."""
    run = typed(cfg, Run)
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    with Progress([out.name]) as progress:
        eval_loss = train(run, out, watch=lambda **values: progress.update(out.name, **values))
    if hydra.mode is RunMode.RUN:
        from medtune.comparison import summary

        print(summary([out]), flush=True)
    return eval_loss


def main() -> None:
    """Entry point of `python -m medtune.train` and `medtune-train`."""
    command(run_member, "train")


if __name__ == "__main__":
    main()
