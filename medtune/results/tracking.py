"""What happens in a run -> history.jsonl and samples.jsonl, and the same events to Weights & Biases.

The only module that knows W&B. The files never depend on it, and it never stops training.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from medtune.config.enums import WandbMode
from medtune.config.schema import Wandb
from medtune.config.serialize import config_hash
from medtune.results.checkpoints import Saved
from medtune.runtime.cache import cache_folder
from medtune.runtime.errors import RunPaused, UserError, first_line
from medtune.runtime.files import append_jsonl, read_jsonl

log = logging.getLogger(__name__)

WANDB_FOLDERS = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
SAMPLE_COLUMNS = (
    "step", "prompt", "category", "reference", "answer", "stop", "tokens", "rouge_l", "chrf", "safe",
)  # fmt: skip


@dataclass
class RunIdentity:
    """What a run is called where it is tracked: its `name` in the `sweep`, when it first `started`, its configuration.

    A resumed run keeps its identity.
    """

    name: str
    sweep: str
    started: str
    configuration: dict[str, Any]

    @property
    def key(self) -> str:
        """The same for a run and what resumes it, different for any other run."""
        return config_hash({"member": self.name, "group": self.sweep, "started": self.started})


class Tracker(Protocol):
    """Takes the events of one run."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Takes numbers of one optimizer step; keys beginning with eval_ belong to an evaluation."""

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Takes the answers of one evaluation; `rows` have the keys of SAMPLE_COLUMNS but step."""

    def summarize(self, values: dict[str, Any]) -> None:
        """Takes the numbers by which runs are compared."""

    def finish(self, failed: bool) -> None:
        """Ends the tracking."""


class FileTracker:
    """Writes history.jsonl and samples.jsonl. metrics.json, which holds what is summarized, is not written here."""

    def __init__(self, out: Path, saved: Saved | None) -> None:
        """`saved`: the checkpoint from which the run resumes; later events are removed."""
        self.history, self.samples = out / "history.jsonl", out / "samples.jsonl"
        for path in (self.history, self.samples):
            truncate_after(path, saved)

    def log(self, step: int, values: dict[str, float]) -> None:
        append_jsonl(self.history, [{"step": step, **values}])

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        append_jsonl(self.samples, [{"step": step, **row} for row in rows])

    def summarize(self, values: dict[str, Any]) -> None: ...

    def finish(self, failed: bool) -> None: ...


class WandbTracker:
    """Sends events to a W&B run. The first error ends W&B for this run, not the training."""

    def __init__(self, out: Path, wandb: Wandb, identity: RunIdentity) -> None:
        self.run = start(out, wandb, identity)
        self.table: Any = None

    def log(self, step: int, values: dict[str, float]) -> None:
        named = {wandb_name(name): value for name, value in values.items()}
        self.send(lambda run: run.log({"train/global_step": step, **named}))

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.send(lambda run: self.log_table(run, step, rows))

    def log_table(self, run: Any, step: int, rows: list[dict[str, Any]]) -> None:
        """Adds rows to the table of answers, which grows from evaluation to evaluation."""
        import wandb

        if self.table is None:
            # A table of another mode can be logged only once.
            self.table = wandb.Table(columns=list(SAMPLE_COLUMNS), log_mode="INCREMENTAL")
        for row in rows:
            values = {"step": step, **row}
            self.table.add_data(*(values[column] for column in SAMPLE_COLUMNS))
        run.log({"train/global_step": step, "samples": self.table})

    def summarize(self, values: dict[str, Any]) -> None:
        self.send(lambda run: run.summary.update(values))

    def finish(self, failed: bool) -> None:
        self.send(lambda run: run.finish(exit_code=int(failed)))

    def send(self, action: Callable[[Any], None]) -> None:
        """Applies `action` to the W&B run, if there is one."""
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:
            self.run = None
            log.warning("W&B stopped (%s): history.jsonl and samples.jsonl go on", first_line(error))


class Trackers:
    """Passes each event to all trackers of a run. As a context manager it ends them, as failed after an exception."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = trackers

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(failed=kind not in (None, RunPaused))

    def log(self, step: int, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, values)

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for tracker in self.trackers:
            tracker.log_samples(step, rows)

    def summarize(self, values: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.summarize(values)

    def finish(self, failed: bool) -> None:
        for tracker in self.trackers:
            tracker.finish(failed)


def wandb_name(name: str) -> str:
    """Returns the name of a number on the W&B dashboard: eval_loss is eval/loss, everything else is under train/."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def stay_out_of_home() -> None:
    """Gives W&B folders in medtune's cache where the user's home, which it writes into, cannot be written."""
    try:
        writable = os.access(Path.home(), os.W_OK)
    except RuntimeError:  # no home is known
        writable = False
    for name in () if writable else WANDB_FOLDERS:
        os.environ.setdefault(name, str(cache_folder() / "wandb"))


def start(out: Path, wandb_config: Wandb, identity: RunIdentity) -> Any:
    """Starts the W&B run of one member: offline where the server cannot be reached, None where W&B is left out."""
    if wandb_config.mode is WandbMode.disabled:
        return None
    stay_out_of_home()
    import wandb

    settings = wandb.Settings(
        # Console, git remote and machine stay private; a kill loses at most half a second of events.
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
                project=wandb_config.project, entity=wandb_config.entity, dir=str(out), mode=mode,
                name=identity.name, group=identity.sweep, config=identity.configuration, id=identity.key,
                settings=settings, reinit="create_new", resume="allow",
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
    """Raises `UserError` if the run should go online without W&B credentials, where W&B itself would stop and ask."""
    if mode is not WandbMode.online:
        return
    import wandb
    from wandb.sdk.lib import wbauth

    if wbauth.authenticate_session(host=wandb.Settings().base_url, source="medtune", prompt=False) is None:
        raise UserError("wandb=online needs an account: set WANDB_API_KEY, or run `wandb login`, or use wandb=offline")


def truncate_after(path: Path, saved: Saved | None) -> None:
    """Removes from a file of JSON lines what came after a checkpoint, because it will come again.

    Without a checkpoint the file is removed.
    """
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
