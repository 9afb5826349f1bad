"""`hydra/launcher=sequential`: Hydra's door to medtune/sweep.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


@dataclass
class SequentialConf:
    """Members run one after another."""

    _target_: str = "hydra_plugins.medtune.sequential.SequentialLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="sequential", node=SequentialConf, provider="medtune")


class SequentialLauncher(Launcher):
    """Compose and check every member, then run them one after another in this process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        # Hydra loads every launcher it finds, also for `--cfg`: medtune's modules only when one launches.
        from medtune.checks import typed
        from medtune.config import Refusal, Run, folder_name
        from medtune.sweep import labels, require_distinct, run_members

        if self.config.hydra.sweeper.get("max_batch_size"):
            raise Refusal("hydra.sweeper.max_batch_size: members run one after another anyway; leave it out")
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        names = labels([filter_overrides(overrides) for overrides in job_overrides])
        configs, problems = [], []
        for i, overrides in enumerate(job_overrides):
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = initial_job_idx + i
                config.hydra.sweep.subdir = folder_name([names[i]])
            configs.append(config)
            task = config.copy()
            with open_dict(task):
                del task["hydra"]
            try:
                typed(task, Run)
            except Refusal as refusal:
                problems += [f"{names[i]}: {line}" for line in refusal.lines]
        if problems:
            raise Refusal(*problems)
        sweep = Path(self.config.hydra.sweep.dir).absolute()
        folders = [sweep / c.hydra.sweep.subdir for c in configs]
        require_distinct(sweep, folders, names)
        returns: list[JobReturn] = []

        def run(i: int) -> BaseException | None:
            returned = run_job(
                hydra_context=self.hydra_context,
                task_function=self.task_function,
                config=configs[i],
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
            returns.append(returned)
            return returned._return_value if returned.status is JobStatus.FAILED else None

        run_members(sweep, folders, names, run)
        return returns
