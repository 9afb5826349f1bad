"""Train one adapter: data -> tokenizer -> base -> adapter -> trainer -> result folder.

python -m medtune.train                     one run on the embedded default
python -m medtune.train lora.r=16,32 -m     a sweep
"""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from medtune.benchmark import load_tasks
from medtune.checks import typed
from medtune.command_line import command
from medtune.config import Run
from medtune.quiet import quiet_libraries
from medtune.result import FILE_ONLY, Result, plain
from medtune.tracking import Tracker, require_account

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from medtune.data import Conversations
    from medtune.tokens import Tokens

log = logging.getLogger(__name__)


def train(run: Run, out: Path) -> float:
    """Train one adapter into the result folder `out` and return its best validation loss (nats per taught token).

    The order matters: what is cheap to refuse comes first, and the adapter is attached last, right after seeding.
    Raises `Refusal` for the user's mistakes and `Failure` for anything else, both recorded in run.json; on an
    interruption the run is marked and its checkpoints stay.
    """
    with Result(run, out) as result:
        require_account(run.wandb.mode)
        if run.eval.final and run.eval.benchmarks:
            load_tasks(run.eval.benchmarks)  # their data: not after hours of training
        from medtune.data import funnel, prepare
        from medtune.data.questions import write_questions
        from medtune.data.store import SPLITS

        conversations = prepare(run.data)
        funnel.announce(conversations.report)
        result.facts |= {"data_fingerprint": conversations.fingerprint, "data": conversations.report}
        shutil.copyfile(conversations.rejects, out / "rejects.jsonl")
        write_questions([conversations.train, conversations.validation], out / "trained_on.parquet")

        # Importing these takes ten seconds: not before the data is known to be good.
        quiet_libraries()
        from medtune import adapter, model
        from medtune.proof import prove
        from medtune.report import Report, reset_peak_memory
        from medtune.samples import questions
        from medtune.tokens import tokenize
        from medtune.trainer import build_trainer, collator

        device = model.device_for(run.model)
        model.require_memory(run.model, run.quantization, device)
        tokenizer = model.load_tokenizer(run.model)
        tokens = tokenize(tokenizer, conversations, run.trainer.max_length)
        tokens.record(out / "rejects.jsonl")
        splits = [(getattr(tokens, name), getattr(conversations, name)) for name in SPLITS]
        proof = prove(tokenizer, collator(tokenizer), splits, run.model.stop_tokens)
        log.info("mask: %s", proof)
        result.facts["mask"] = plain(proof) | {"taught_share": proof.taught_share}

        reset_peak_memory()
        base = model.load_base(run.model, run.quantization, tokenizer, device)
        model.require_context(base, run.trainer.max_length)
        result.facts["base"] = {
            "hub_id": run.model.hub_id,
            "revision": run.model.revision,
            "fingerprint": model.fingerprint(base),
        }
        tuned = adapter.attach(base, run.lora, run.seed)
        trained, total = adapter.trainable_parameters(tuned)
        result.facts |= {"trainable_parameters": trained, "total_parameters": total}
        log.info("adapter: %s of %s parameters train (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
        result.write()

        asked = questions(run, tokens.validation, conversations.validation)
        member, sweep = out.name, f"{run.name}/{out.parent.name}"
        with Tracker(out, run.wandb, name=member, group=sweep, config=plain(run)) as tracker:
            report = Report(tracker, tokenizer, asked, run.eval, out / "metrics.json")
            trainer = build_trainer(
                tuned, tokenizer, tokens, run.trainer, run.eval, run.seed, out / "checkpoints", [report]
            )
            tracker.summarize({f"data/{name}": count for name, count in conversations.report["funnel"].items()})
            trainer.train()
            adapter.release(tuned, tokenizer, out / "adapter", tokens.validation[0]["input_ids"])
            metrics = report.metrics()
            tracker.summarize(metrics)
            if run.eval.final:
                test(tuned, tokenizer, tokens, conversations, run, result, tracker)
    return metrics["best"]["eval_loss"]


def test(
    tuned: "PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: "Tokens",
    conversations: "Conversations",
    run: Run,
    result: Result,
    tracker: Tracker,
) -> None:
    """Measure the kept adapter on the test set. What goes wrong here is recorded, and costs no trained adapter."""
    from medtune.assessment import assess
    from medtune.examination import examination

    if not len(tokens.test):
        log.warning("the test set is empty: nothing is measured on it")
        return
    exam = examination(tokens, conversations, run.eval, run.data.system_prompt)
    fingerprint, out = result.facts["base"]["fingerprint"], result.out
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
    eval_loss = train(run, out)
    if hydra.mode is RunMode.RUN:
        from medtune.comparison import summary

        print(summary([out]), flush=True)
    return eval_loss


def main() -> None:
    """Entry point of `python -m medtune.train` and `medtune-train`."""
    command(run_member, "train")


if __name__ == "__main__":
    main()
