"""`hydra/launcher=shared_base`: Hydra's door to medtune/sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


@dataclass
class SharedBaseConf:
    """Members share one base; the keys are explained in medtune/sweep/pipeline.py."""

    _target_: str = "hydra_plugins.medtune.shared_base.SharedBaseLauncher"
    width: Any = None
    processes: Any = None
    prune: Any = None


ConfigStore.instance().store(group="hydra/launcher", name="shared_base", node=SharedBaseConf, provider="medtune")


class Returned(JobReturn):
    """What a member returned. A failure is raised when a sweeper asks, without Hydra's line of all overrides."""

    @property
    def return_value(self) -> Any:
        if self.status is JobStatus.FAILED:
            raise self._return_value
        return self._return_value


class SharedBaseLauncher(Launcher):
    """Compose and check every member, then run them on the bases that they share."""

    def __init__(self, width: Any, processes: Any, prune: Any) -> None:
        self.width, self.processes, self.prune = width, processes, prune

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    @property
    def proposed(self) -> bool:
        """Whether a sweeper chooses members, a few at a time, by what came of those before."""
        return bool(self.config.hydra.runtime.choices["hydra/sweeper"] != "basic")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the members that a sweeper asks for; returns what became of each, in its order.

        Raises `UserError` with every member's mistakes before any member runs.
        """
        # Hydra loads every launcher it finds, also for `--cfg`: medtune's modules only when one launches.
        from medtune.runtime.errors import UserError
        from medtune.sweep.ledger import open_ledger
        from medtune.sweep.pipeline import Settings

        if self.config.hydra.sweeper.get("max_batch_size"):
            raise UserError("hydra.sweeper.max_batch_size: hydra.launcher says how many members run at a time")
        settings = Settings(self.width, self.processes, self.prune)
        setup_globals()
        sweep = Path(self.config.hydra.sweep.dir).absolute()
        members, configs = self.compose(job_overrides, initial_job_idx, sweep)
        # A grid that names a run twice is a mistake; Optuna may well propose one twice.
        first: dict[str, Any] = {}
        once = [first.setdefault(member.key, member) for member in members]
        distinct = list(first.values()) if self.proposed else members
        with open_ledger(sweep, self.command()) as ledger:
            ledger.add_members(distinct)
            for member, config in zip(once, configs, strict=True):
                save(config, member.folder / (self.config.hydra.output_subdir or ".hydra"))
            self.log_to(sweep)
            self.run(distinct, ledger, settings)
        failure = failures_of(distinct, ledger)
        return [returned(member, words, failure) for member, words in zip(once, job_overrides, strict=True)]

    def command(self) -> list[str]:
        """Returns the overrides that resume the sweep: all but its folder, and that it is a sweep."""
        overrides = self.config.hydra.overrides
        anew = ("hydra.sweep.dir", "hydra.mode")
        return [*(word for word in overrides.hydra if not word.startswith(anew)), *overrides.task]

    def log_to(self, sweep: Path) -> None:
        """Writes the sweep's own log into its folder."""
        with open_dict(self.config):
            self.config.hydra.runtime.output_dir = str(sweep)
        configure_log(self.config.hydra.job_logging, self.config.hydra.verbose)

    def run(self, members: Sequence[Any], ledger: Any, settings: Any) -> None:
        """Runs members; however that ends, sweep.json and the table say how far they came."""
        from medtune.sweep.pipeline import run_sweep

        try:
            run_sweep(members, ledger, settings)
        finally:
            for member in members:
                ledger.update(member)
            if not self.proposed:  # others come again with more
                from medtune.results.tables import print_summary  # reads Parquet: not before it is needed

                print_summary(ledger.folders)

    def compose(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, sweep: Path
    ) -> tuple[list[Any], list[DictConfig]]:
        """Returns members, and their composed configurations. Raises `UserError` with every member's mistakes."""
        from medtune.config.overrides import constant_keys
        from medtune.config.schema import RunConfig
        from medtune.config.validation import build_config
        from medtune.runtime.errors import UserError
        from medtune.sweep.ledger import Member, folder_of, names

        common = constant_keys(self.config.hydra.overrides.task)
        swept = [filter_overrides(words) for words in job_overrides]
        if self.proposed:  # the next batch may differ in what this one does not
            called = [",".join(word for word in words if word.partition("=")[0] not in common) for words in swept]
        else:
            called = names(swept, common)
        members, configs, problems = [], [], []
        for i, (name, words) in enumerate(zip(called, job_overrides, strict=True)):
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(words))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = initial_job_idx + i
                config.hydra.sweep.subdir = folder_of(sweep, name).name
            configs.append(config)
            task = config.copy()
            with open_dict(task):
                del task["hydra"]
            try:
                members.append(Member(name, build_config(task, RunConfig), folder_of(sweep, name)))
            except UserError as refusal:
                problems += [f"{name}: {line}" for line in refusal.lines]
        if problems:
            raise UserError(*problems)
        return members, configs


def failures_of(members: Sequence[Any], ledger: Any) -> Exception:
    """Returns the error that names every member that failed, with the first line of its own error."""
    from medtune.runtime.errors import RunFailed
    from medtune.runtime.status import FINISHED

    rows = [ledger.rows[member.key] for member in members]
    failed = [row for row in rows if row["status"] not in FINISHED]
    lines = [f"{row['overrides']}: {str(row['error'] or 'not started').splitlines()[0]}" for row in failed]
    return RunFailed("\n".join([f"{len(failed)} of {len(members)} members failed", *lines]))


def returned(member: Any, overrides: Sequence[str], failure: Exception) -> Returned:
    """Returns what a sweeper gets for a member: its eval_loss, or, when asked, all failures at once."""
    from medtune.runtime.status import FINISHED

    over = member.status in FINISHED
    answer = Returned(overrides=list(overrides), working_dir=str(member.folder), task_name="train")
    answer.status = JobStatus.COMPLETED if over else JobStatus.FAILED
    answer._return_value = member.eval_loss if over else failure
    return answer


def save(config: DictConfig, folder: Path) -> None:
    """Writes a composed configuration as Hydra does for a job of its own."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True, exist_ok=True)
    task = config.copy()
    with open_dict(task):
        del task["hydra"]
    OmegaConf.save(task, folder / "config.yaml")
    OmegaConf.save({"hydra": config.hydra}, folder / "hydra.yaml")
    OmegaConf.save(config.hydra.overrides.task, folder / "overrides.yaml")
