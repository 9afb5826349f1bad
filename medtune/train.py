"""Train one adapter: data -> tokenizer -> base -> adapter -> trainer -> result folder.

python -m medtune.train                     one run on the embedded default
python -m medtune.train lora.r=16,32 -m     a sweep
"""

import logging
import warnings
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from medtune.checks import typed
from medtune.command_line import command
from medtune.config import Run
from medtune.data import describe_rejects, prepare
from medtune.result import Result, plain, summary, write_jsonl
from medtune.tracking import Tracker, require_account

log = logging.getLogger(__name__)


def train(run: Run, out: Path) -> float:
    """Train one adapter into the result folder `out` and return its best validation loss (nats per taught token).

    The order matters: what is cheap to refuse comes first, and the adapter is attached last, right after seeding.
    Raises `Refusal` for the user's mistakes and `Failure` for anything else, both recorded in run.json; on an
    interruption the run is marked and its checkpoints stay.
    """
    with Result(run, out) as result:
        require_account(run.wandb.mode)
        conversations = prepare(run.data)
        result.facts["data_fingerprint"] = conversations.fingerprint
        write_jsonl(out / "rejects.jsonl", conversations.rejects)

        # Importing these takes ten seconds: not before the data is known to be good.
        quiet_libraries()
        from medtune import adapter, model
        from medtune.conversation import fit, tokenize
        from medtune.report import Report, reset_peak_memory
        from medtune.samples import questions
        from medtune.trainer import build_trainer

        device = model.device_for(run.model)
        model.require_memory(run.model, run.quantization, device)
        tokenizer = model.load_tokenizer(run.model)
        training, too_long = fit(tokenizer, conversations.train, run.trainer.max_length)
        validation, also_too_long = fit(tokenizer, conversations.validation, run.trainer.max_length)
        if too_long or also_too_long:
            write_jsonl(out / "rejects.jsonl", conversations.rejects + too_long + also_too_long)
            log.warning("data: left out %s; see rejects.jsonl", describe_rejects(too_long + also_too_long))
        training_rows, validation_rows = tokenize(tokenizer, training), tokenize(tokenizer, validation)

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

        asked = questions(run.samples, run.data, validation)
        member, sweep = out.name, f"{run.name}/{out.parent.name}"
        with Tracker(out, run.wandb, name=member, group=sweep, config=plain(run)) as tracker:
            report = Report(tracker, tokenizer, asked, run.samples.max_new_tokens, out / "metrics.json")
            trainer = build_trainer(
                tuned, tokenizer, training_rows, validation_rows, run.trainer, run.seed, out / "checkpoints", [report]
            )
            trainer.train()
            adapter.release(tuned, tokenizer, out / "adapter", validation_rows[0]["input_ids"])
            metrics = report.metrics()
            tracker.summarize(metrics)
    return metrics["best"]["eval_loss"]


def quiet_libraries() -> None:
    """Leave the screen to what the user needs to know; train.log has the rest."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Deprecations speak to programmers; bitsandbytes looks on a CPU for a kernel that it does not need.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.captureWarnings(True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def run_member(cfg: DictConfig) -> float:
    """Hydra's task: one run, or one member of a sweep."""
    run = typed(cfg)
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    eval_loss = train(run, out)
    if hydra.mode is RunMode.RUN:
        print(summary([out]), flush=True)
    return eval_loss


def main() -> None:
    """Entry point of `python -m medtune.train` and `medtune-train`."""
    command(run_member, "train")


if __name__ == "__main__":
    main()
