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
        # Hydra loads every launcher it finds, also for `--cfg`: medtune's modules only when one launches.
        from medtune.runtime.errors import RunFailed, UserError
        from medtune.runtime.status import FINISHED
        from medtune.sweep.ledger import open_ledger
        from medtune.sweep.pipeline import Settings, run_sweep

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
        overrides = self.config.hydra.overrides
        own = ("hydra.sweep.dir", "hydra.mode")  # where and that it is a sweep: whoever goes on with it says so anew
        words = [word for word in overrides.hydra if not word.startswith(own)]
        with open_ledger(sweep, [*words, *overrides.task]) as ledger:
            ledger.add_members(distinct)
            for member, config in zip(once, configs, strict=True):
                save(config, member.folder / (self.config.hydra.output_subdir or ".hydra"))
            with open_dict(self.config):
                self.config.hydra.runtime.output_dir = str(sweep)
            configure_log(self.config.hydra.job_logging, self.config.hydra.verbose)
            try:
                run_sweep(distinct, ledger, settings)
            finally:
                for member in distinct:
                    ledger.update(member)
                if not self.proposed:  # others come again with more
                    from medtune.results.tables import summary  # reads Parquet: not before it is needed

                    print(summary(ledger.folders), flush=True)
        failed = [
            f"{row['overrides']}: {str(row['error']).splitlines()[0]}"
            for row in (ledger.rows[member.key] for member in distinct)
            if row["status"] not in FINISHED
        ]
        failure = RunFailed("\n".join([f"{len(failed)} of {len(distinct)} members failed", *failed]))
        returns = []
        for member, words in zip(once, job_overrides, strict=True):
            over = member.status in FINISHED
            returned = Returned(overrides=list(words), working_dir=str(member.folder), task_name="train")
            returned.status = JobStatus.COMPLETED if over else JobStatus.FAILED
            # All failures at once, whichever of them the sweeper looks at first.
            returned._return_value = member.eval_loss if over else failure
            returns.append(returned)
        return returns

    def compose(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, sweep: Path
    ) -> tuple[list[Any], list[DictConfig]]:
        """Members, and their composed configurations. Raises `UserError` with every member's mistakes."""
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


def save(config: DictConfig, folder: Path) -> None:
    """Write a composed configuration as Hydra does for a job of its own."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True, exist_ok=True)
    task = config.copy()
    with open_dict(task):
        del task["hydra"]
    OmegaConf.save(task, folder / "config.yaml")
    OmegaConf.save({"hydra": config.hydra}, folder / "hydra.yaml")
    OmegaConf.save(config.hydra.overrides.task, folder / "overrides.yaml")
