"""What happens in a run -> history.jsonl and samples.jsonl, and the same events to Weights & Biases.

The only module that knows W&B. The files never depend on it, and it never stops training.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from medtune.config.enums import WandbMode
from medtune.config.schema import Wandb
from medtune.config.serialize import config_hash
from medtune.results.checkpoints import Saved
from medtune.runtime.errors import RunPaused, UserError, first_line
from medtune.runtime.files import append_jsonl, read_jsonl

log = logging.getLogger(__name__)

SAMPLE_COLUMNS = (
    "step", "prompt", "category", "reference", "answer", "stop", "tokens", "rouge_l", "chrf", "safe",
)  # fmt: skip


class Tracker:
    """Records one run. Use as a context manager: the W&B run ends with it, as failed if an exception passes."""

    def __init__(
        self, out: Path, wandb: Wandb, name: str, group: str, config: dict[str, Any], saved: Saved | None, started: str
    ) -> None:
        """`saved`: the checkpoint from which the run goes on. `started`: when it first began."""
        self.history = out / "history.jsonl"
        self.samples = out / "samples.jsonl"
        for path in (self.history, self.samples):
            truncate_after(path, saved)
        identity = config_hash({"member": name, "group": group, "started": started})  # a resumed run stays the same one
        self.run = start(out, wandb, name, group, config, identity)
        self.table: Any = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.send(lambda run: run.finish(exit_code=0 if kind in (None, RunPaused) else 1))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record numbers of one step; keys beginning with eval_ belong to an evaluation."""
        append_jsonl(self.history, [{"step": step, **values}])
        named = {
            f"eval/{k.removeprefix('eval_')}" if k.startswith("eval_") else f"train/{k}": v for k, v in values.items()
        }
        self.send(lambda run: run.log({"train/global_step": step, **named}))

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Record the answers of one evaluation; `rows` have the keys of SAMPLE_COLUMNS but step."""
        rows = [{"step": step, **row} for row in rows]
        append_jsonl(self.samples, rows)

        def log_table(run: Any) -> None:
            import wandb

            if self.table is None:
                # A plain table can be logged once only; this one grows from evaluation to evaluation.
                self.table = wandb.Table(columns=list(SAMPLE_COLUMNS), log_mode="INCREMENTAL")
            for row in rows:
                self.table.add_data(*(row[column] for column in SAMPLE_COLUMNS))
            run.log({"train/global_step": step, "samples": self.table})

        self.send(log_table)

    def summarize(self, values: dict[str, Any]) -> None:
        """Record the numbers by which runs are compared."""
        self.send(lambda run: run.summary.update(values))

    def send(self, action: Callable[[Any], None]) -> None:
        """Do something with the W&B run; the first error ends W&B for this run, not the training."""
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:
            self.run = None
            log.warning("W&B stopped (%s): history.jsonl and samples.jsonl go on", first_line(error))


def start(out: Path, wandb_config: Wandb, name: str, group: str, config: dict[str, Any], identity: str) -> Any:
    """Start the W&B run of one member: offline where the server cannot be reached, None where W&B is left out."""
    if wandb_config.mode is WandbMode.disabled:
        return None
    import wandb

    settings = wandb.Settings(
        # Console, git remote and machine are nobody's business; a kill loses at most half a second of events.
        console="off",
        silent=True,
        disable_git=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=0.5,
        init_timeout=30,
        finish_timeout=20,
    )

    modes: list[Literal["online", "offline"]] = ["offline"]
    if wandb_config.mode is WandbMode.online:
        modes.insert(0, "online")
    for mode in modes:
        try:
            run = wandb.init(
                project=wandb_config.project, entity=wandb_config.entity, dir=str(out), mode=mode, name=name,
                group=group, config=config, settings=settings, reinit="create_new", id=identity, resume="allow",
            )  # fmt: skip
        except Exception as error:
            log.warning("W&B cannot record %s (%s)", mode, first_line(error))
            continue
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step")
        run.define_metric("eval/loss", step_metric="train/global_step", summary="min")
        return run
    return None


def require_account(mode: WandbMode) -> None:
    """Raises `Refusal` if the run should go online without W&B credentials, where W&B itself would stop and ask."""
    if mode is not WandbMode.online:
        return
    import wandb
    from wandb.sdk.lib import wbauth

    if wbauth.authenticate_session(host=wandb.Settings().base_url, source="medtune", prompt=False) is None:
        raise UserError("wandb=online needs an account: set WANDB_API_KEY, or run `wandb login`, or use wandb=offline")


def truncate_after(path: Path, saved: Saved | None) -> None:
    """Take from a file of JSON lines what came after a checkpoint: it will come again."""
    if saved is None:
        path.unlink(missing_ok=True)
        return
    kept = []
    for row in read_jsonl(path):
        evaluation = "loss" not in row
        if row["step"] < saved.step or (row["step"] == saved.step and (saved.evaluated or not evaluation)):
            kept.append(row)
    unfinished = path.with_suffix(".tmp")
    unfinished.unlink(missing_ok=True)
    append_jsonl(unfinished, kept)
    unfinished.replace(path)
