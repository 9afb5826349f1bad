"""What the user types becomes a composed configuration, and every mistake in it one line in the user's words.

Hydra is known here, to the launcher, and to the `main`s.
"""

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from medtune import interruption
from medtune.checks import problem_with
from medtune.config import Evaluation, Inspection, Refusal, Run
from medtune.result import Failure, read_json
from medtune.schema import did_you_mean, exists, is_mapping
from medtune.sweep import elsewhere

PACKAGE = Path(__file__).parent
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


def command(task: Callable[[DictConfig], Any], config_name: str, schema: type = Run) -> None:
    """Run `task` on the configuration that the command line asks for; ends the process.

    `schema`: the dataclass of that configuration.

    Exit status: 0 done, 1 a run failed, 2 refused before anything ran, 130 interrupted.
    """
    interruption.listen()
    full_error = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors to us instead of printing them
    try:
        register()
        arguments = get_args_parser().parse_intermixed_args()
        # Hydra's own parsing takes options before the first or after the last override only.
        typed = list(map(quoted, arguments.overrides))
        options = [word for word in sys.argv[1:] if word not in arguments.overrides]
        if schema is Run and any(word.startswith("sweep=") for word in typed):
            typed, options, arguments.multirun = into_sweep(typed), [*options, "-m"], True
        sys.argv[1:], arguments.overrides = options + typed, typed
        problems = list(problems_typed(arguments.overrides, schema))
        if arguments.multirun and schema is not Run:
            problems.append("-m sweeps training; leave it out here")
        if arguments.multirun and arguments.cfg:
            problems.append("--cfg shows one run: leave -m out and give each key one value")
        if problems:
            raise Refusal(*problems)
        if any(word.startswith("hydra/launcher=") for word in typed) and (common := unswept(typed)):
            word = f"hydra.job.config.override_dirname.exclude_keys={common}"
            sys.argv.insert(len(sys.argv) - len(typed), word)
        errors: list[Exception] = []

        @wraps(task)
        def run(cfg: DictConfig) -> Any:
            try:
                return task(cfg)
            except Exception as error:
                if HydraConfig.get().mode is RunMode.MULTIRUN:
                    raise  # the launcher keeps it, and goes on with the other members
                errors.append(error)  # kept from Hydra, which would print the overrides above it

        with elsewhere.concluded():
            hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(run)()
        for error in errors:
            raise error
    except Refusal as refusal:
        leave(2, *refusal.lines)
    except (HydraException, OmegaConfBaseException) as error:
        leave(2, in_the_users_words(error, schema))
    except KeyboardInterrupt:
        leave(130, "interrupted; what was saved stays")
    except Failure as failure:
        leave(1, *str(failure).splitlines())
    except OSError as error:
        # Hydra makes the result folder before the run can check it.
        leave(2, f"{error.filename}: {error.strerror}: choose another folder with hydra.run.dir or hydra.sweep.dir")
    except Exception as error:
        # Everything that a run raises is a Failure by now: this is a configuration that Hydra itself trips over.
        if full_error:
            raise
        leave(2, f"{type(error).__name__}: {' '.join(str(error).split())} (HYDRA_FULL_ERROR=1 shows where)")


def into_sweep(words: list[str]) -> list[str]:
    """The overrides of a command with `sweep=FOLDER`; with nothing but Hydra's own beside it, also those by which the
    sweep in it was begun.

    Raises `Refusal` when there is none.
    """
    named = next(word for word in words if word.startswith("sweep=")).partition("=")[2].strip("'\"")
    folder = Path(named).expanduser()
    given = [word for word in words if not word.startswith("sweep=")]
    if not named:
        raise Refusal("sweep= names no folder: sweep=multirun/medtune/TIME")
    if all(word.startswith("hydra") for word in given):  # how it is run, not what
        known = read_json(folder / "sweep.json").get("command")
        if known is None:
            raise Refusal(f"sweep={named}: no sweep in it to go on with: name a folder that holds a sweep.json")
        anew = {word.partition("=")[0] for word in given}
        given = [*(word for word in map(quoted, known) if word.partition("=")[0] not in anew), *given]
    return [*given, f"hydra.sweep.dir='{folder}'"]


def quoted(word: str) -> str:
    """An override whose value has an = in it, as members' folders have, in the quotes that Hydra needs to read it."""
    name, _, value = word.partition("=")
    if "=" not in value or re.search(r"""['"{$]""", value):
        return word
    if listed := re.fullmatch(r"\[(.*)\]", value):
        return f"{name}=[{','.join(repr(part.strip()) for part in listed[1].split(','))}]"
    return f"{name}='{value}'" if "[" not in value else word


def unswept(words: Sequence[str]) -> list[str]:
    """The keys that have one value for all members of a sweep; none if there is no sweep."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    task = [override for override in parsed if not override.is_hydra_override()]
    if not any(override.is_sweep_override() for override in task):
        return []
    return [override.get_key_element() for override in task if not override.is_sweep_override()]


def leave(status: int, *lines: str) -> NoReturn:
    """End the process with one line for each thing that is wrong."""
    for line in lines:
        print(f"medtune: {line}", file=sys.stderr)
    logging.shutdown()
    sys.exit(status)


def register() -> None:
    """Tell Hydra the schemas and the experiments."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=Run)
    store.store(name="inspection_schema", node=Inspection)
    store.store(name="evaluation_schema", node=Evaluation)
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        try:
            node = OmegaConf.load(path)
        except Exception as error:  # the parser's own exception types are not OmegaConf's
            raise Refusal(f"experiments/{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
        store.store(group="experiment", name=path.stem, package="_global_", node=node)


def options(group: str) -> list[str]:
    """The choices of a group of `conf/`, or the experiments."""
    folder = EXPERIMENTS if group == "experiment" else CONF / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


def groups() -> list[str]:
    """The groups of `conf/`, and `experiment`."""
    return ["experiment", *sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir())]


def problems_typed(words: list[str], schema: type) -> Iterator[str]:
    """One line for each override that cannot be right, before Hydra composes anything."""
    parser = OverridesParser.create()
    for word in words:
        if exists("run", schema) and Path(word).is_dir():
            yield f"{word}: did you mean run={word}?"
            continue
        try:
            override = parser.parse_override(word)
        except HydraException:
            name, equals, value = word.partition("=")
            hint = f"""quote the value twice, as '{name}="{value}"'""" if equals else f"did you mean {word}=…?"
            yield f"{word}: not of the form key=value; {hint}"
            continue
        name = override.key_or_group
        if override.is_delete() and is_mapping(name.rpartition(".")[0]):
            continue  # a member of a mixture
        elif override.is_delete():
            yield f"{word}: nothing can be taken out of a run; change it, as {word.strip('~')}=…"
        elif name == "hydra.run.dir" and is_over(Path(str(override.value()))):
            # Here, because Hydra writes its own files into the folder before the run could refuse.
            yield f"{override.value()} already holds a run, which would be overwritten: choose another hydra.run.dir"
        elif name.startswith("hydra"):
            continue
        elif name in groups():
            yield from unknown_options(override)
        elif is_mapping(name.rpartition(".")[0]):
            continue  # its names are another library's: Hydra says what is wrong with them
        elif not exists(name, schema):
            near = difflib.get_close_matches(name, groups(), n=1)
            yield f"{name}: did you mean {near[0]}?" if near and "." not in name else did_you_mean(name, schema)
        else:
            for value in values_of(override):
                problem = problem_with(name, value, schema)
                if problem:
                    yield problem


def is_over(folder: Path) -> bool:
    """Whether a folder holds a run that nothing is left to do of, or whose run.json cannot be read."""
    return (folder / "run.json").exists() and read_json(folder / "run.json").get("status", "done") in ("done", "pruned")


def unknown_options(override: Override) -> Iterator[str]:
    """One line for each choice that a group does not have."""
    group = override.key_or_group
    for choice in map(str, values_of(override)):
        if choice not in options(group):
            yield f"{group}={choice}: {nearest(group, choice)}"


def nearest(group: str, choice: str) -> str:
    """The option of a group that was probably meant, or all there are."""
    if extra := EXTRAS.get(f"{group}={choice}"):
        return f"not installed: pip install 'medtune[{extra}]'"
    known = options(group) or [name.removesuffix(".yaml") for name in ConfigStore.instance().list(group)]
    near = difflib.get_close_matches(choice, known, n=1)
    return f"did you mean {group}={near[0]}?" if near else f"there is {', '.join(known)}"


def values_of(override: Override) -> list[Any]:
    """The values an override gives its key: one, or several in a sweep. Interpolations are left to Hydra."""
    if override.is_sweep_override():
        if override.is_choice_sweep() or override.is_range_sweep():
            return list(override.sweep_iterator())
        return []  # glob() and interval() are resolved by the sweeper
    value = override.value()
    return [] if isinstance(value, str) and "${" in value else [value]


def in_the_users_words(error: BaseException, schema: type) -> str:
    """Hydra's and OmegaConf's errors in one line that names the file and the key."""
    chain = [e for e in (error, error.__cause__, error.__context__) if e is not None]
    text = "\n".join(str(e) for e in chain)
    if swept := re.search(r"Ambiguous value for argument '(.*)'", text):
        return f"{swept[1]} has several values: add -m for a sweep, or brackets for a list"
    if option := re.search(r"Could not (?:find|load) '([\w/]+)/([^'/]+)'", text):
        return experiment_with(option[1], option[2]) + f"{option[1]}={option[2]}: {nearest(option[1], option[2])}"
    full_key = re.search(r"full_key: (\S+)", text)
    interpolation = any(isinstance(e, InterpolationResolutionError) for e in chain)
    if interpolation or not full_key or full_key[1].startswith("hydra."):
        return text.splitlines()[0]
    key, file, value = full_key[1], re.search(r"In '(\S+?)'", text), re.search(r"Value '(.*?)'", text)
    where = ""
    if file and file[1].startswith("experiment/"):
        where = f"experiments/{file[1].removeprefix('experiment/')}.yaml: "
    elif file and file[1] != "run_schema":
        where = f"{CONF.name}/{file[1]}.yaml: "
    if not exists(key, schema):
        return where + did_you_mean(key, schema)
    return where + (problem_with(key, value[1] if value else "", schema) or text.splitlines()[0])


def experiment_with(group: str, choice: str) -> str:
    """The experiment file that chooses an option, as 'experiments/NAME.yaml: '; empty if none does."""
    chosen = re.compile(rf"/{group}: *{re.escape(choice)} *(#|$)", re.MULTILINE)
    return next((f"experiments/{p.name}: " for p in EXPERIMENTS.glob("*.yaml") if chosen.search(p.read_text())), "")
