"""The configuration groups of `conf/` and the experiments: what there is to choose from.

Hydra is known here, to overrides.py and command_line.py, to the launchers, and to the `main`s.
"""

import difflib
import re
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from medtune.config.schema import EvaluateConfig, PrepareConfig, RunConfig
from medtune.runtime.errors import UserError

PACKAGE = Path(__file__).parent.parent
# In a wheel the YAML files are inside the package, in a checkout beside it.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF, EXPERIMENTS = HOME / "conf", HOME / "experiments"

# Choices that come with an extra of the package.
EXTRAS = {
    "hydra/launcher=joblib": "joblib",
    "hydra/launcher=submitit_local": "slurm",
    "hydra/launcher=submitit_slurm": "slurm",
    "hydra/launcher=ray": "ray",
    "hydra/sweeper=optuna": "optuna",
}

# Choices by the names that they had before.
RENAMED = {"hydra/launcher=packed": "hydra/launcher=shared_base"}


def register() -> None:
    """Tells Hydra the schemas and the experiments."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(name="prepare_schema", node=PrepareConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        try:
            node = OmegaConf.load(path)
        except Exception as error:  # the parser's own exception types are not OmegaConf's
            raise UserError(f"experiments/{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
        store.store(group="experiment", name=path.stem, package="_global_", node=node)


def group_options(group: str) -> list[str]:
    """Returns the choices of a group of `conf/`, or the experiments."""
    folder = EXPERIMENTS if group == "experiment" else CONF / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


def sweeps(experiment: str) -> bool:
    """Returns whether an experiment carries a sweep of its own."""
    path = EXPERIMENTS / f"{experiment}.yaml"
    return path.is_file() and bool(OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params"))


def group_names() -> list[str]:
    """Returns the groups of `conf/`, and `experiment`."""
    return ["experiment", *sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir())]


def suggest_option(group: str, choice: str) -> str:
    """Returns the option of a group that was probably meant, or all there are."""
    if extra := EXTRAS.get(f"{group}={choice}"):
        return f"not installed: pip install 'medtune[{extra}]'"
    if now := RENAMED.get(f"{group}={choice}"):
        return f"it is called {now} now"
    known = group_options(group) or [name.removesuffix(".yaml") for name in ConfigStore.instance().list(group)]
    near = difflib.get_close_matches(choice, known, n=1)
    return f"did you mean {group}={near[0]}?" if near else f"there is {', '.join(known)}"


def experiment_with(group: str, choice: str) -> str:
    """Returns the experiment file that chooses an option, as 'experiments/NAME.yaml: '; empty if none does."""
    chosen = re.compile(rf"/{group}: *{re.escape(choice)} *(#|$)", re.MULTILINE)
    return next((f"experiments/{p.name}: " for p in EXPERIMENTS.glob("*.yaml") if chosen.search(p.read_text())), "")
