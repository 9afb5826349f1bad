"""What the user types becomes a composed configuration, and every mistake in it one line in the user's words."""

import difflib
import logging
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, InterpolationResolutionError, OmegaConfBaseException

from medtune.config.groups import CONF, experiment_with, register, suggest_option
from medtune.config.keys import did_you_mean, has_key
from medtune.config.overrides import CHDIR, check_overrides, constant_keys, needs_sweep, quoted, resume_sweep_overrides
from medtune.config.reference import help_text
from medtune.config.schema import RunConfig
from medtune.config.validation import check_value
from medtune.runtime import interruption
from medtune.runtime.errors import RunFailed, UserError
from medtune.runtime.screen import protect_streams

# By these PyTorch, accelerate and MPI tell a process which of several it is.
DISTRIBUTED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE", "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED",
)  # fmt: skip


def run_command(
    task: Callable[[DictConfig], Any],
    config_name: str,
    schema: type = RunConfig,
    conclusion: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Runs `task` on the configuration that the command line asks for; ends the process.

    `schema`: the dataclass of that configuration.

    Exit status: 0 done, 1 a run failed, 2 refused before anything ran, 130 interrupted.
    """
    protect_streams()
    interruption.install_handlers()
    full_error = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors to us instead of printing them
    try:
        require_working_folder()
        forget_other_jobs()
        register()
        parser = get_args_parser()
        parser.error = unknown_option  # type: ignore[method-assign]
        arguments = parser.parse_intermixed_args()
        if arguments.help:
            print(help_text(config_name))
            return
        complete_arguments(arguments, schema)
        errors: list[Exception] = []

        @wraps(task)
        def run(cfg: DictConfig) -> Any:
            try:
                if HydraConfig.get().job.chdir:
                    raise UserError(CHDIR)
                return task(cfg)
            except Exception as error:
                if HydraConfig.get().mode is RunMode.MULTIRUN:
                    raise  # the launcher keeps it, and goes on with the other members
                errors.append(error)  # kept from Hydra, which would print the overrides above it

        with conclusion():
            hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(run)()
        for error in errors:
            raise error
    except UserError as refusal:
        exit_with(2, *refusal.lines)
    except (HydraException, OmegaConfBaseException) as error:
        exit_with(2, explain_hydra_error(error, schema))
    except KeyboardInterrupt:
        exit_with(130, "interrupted; what was saved stays")
    except RunFailed as failure:
        exit_with(1, *str(failure).splitlines())
    except OSError as error:
        if error.filename is None:
            exit_with(2, f"{type(error).__name__}: {error.strerror or error}")
        # Hydra makes the result folder before the run can check it.
        exit_with(2, f"{error.filename}: {error.strerror}: choose another folder with hydra.run.dir or hydra.sweep.dir")
    except Exception as error:
        # Everything that a run raises is a `RunFailed` by now: this is a configuration that Hydra itself trips over.
        if full_error:
            raise
        if null := re.search(r"full_key: (\S+)[\s\S]*object_type=NoneType", str(error)):
            group = null[1].rpartition(".")[0]
            exit_with(2, f"{null[1]} is null in what was chosen, and takes no mapping: choose a {group} that has one")
        exit_with(2, f"{type(error).__name__}: {' '.join(str(error).split())} (HYDRA_FULL_ERROR=1 shows where)")


def complete_arguments(arguments: Namespace, schema: type) -> None:
    """Writes into `sys.argv` what Hydra is to read: the overrides completed, after the options.

    Raises `UserError` with a line for each mistake that shows before Hydra composes anything.
    """
    # Hydra's own parsing takes options before the first or after the last override only.
    typed = list(map(quoted, arguments.overrides))
    options = [word for word in sys.argv[1:] if word not in arguments.overrides]
    multirun = arguments.multirun
    if schema is RunConfig and any(word.startswith("sweep=") for word in typed):
        typed, options, multirun = resume_sweep_overrides(typed), [*options, "-m"], True
    if schema is not RunConfig:
        typed.append("hydra.mode=RUN")  # an experiment's sweep is for training
    problems = list(check_overrides(typed, schema))
    if multirun and schema is not RunConfig:
        problems.append("-m sweeps training; leave it out here")
    if multirun and arguments.cfg:
        problems.append("--cfg shows one run: leave -m out and give each key one value")
    if not multirun and not arguments.cfg and (of_sweeps := needs_sweep(typed)):
        problems.append(f"{of_sweeps}: only a sweep has members: add -m")
    if problems:
        raise UserError(*problems)
    if any(word.startswith("hydra/launcher=") for word in typed) and (common := constant_keys(typed)):
        options.append(f"hydra.job.config.override_dirname.exclude_keys={common}")
    sys.argv[1:] = options + typed


def unknown_option(message: str) -> NoReturn:
    """Ends the process for an option that Hydra does not have."""
    exit_with(2, f"{message}; keys are typed without dashes, as lora.r=8 (--help lists them)")


def require_working_folder() -> None:
    """Raises `UserError` where the working folder is gone: neither results nor relative paths have a place then."""
    try:
        Path.cwd()
    except OSError:
        raise UserError("the working folder is gone: change to one that exists") from None


def forget_other_jobs() -> None:
    """Removes what an earlier distributed job left in the environment: PyTorch would wait for its other processes.

    Raises `UserError` where a launcher really started several processes.
    """
    found = [name for name in DISTRIBUTED if name in os.environ]
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("torchrun started several processes, and a run is one: start it as python -m medtune.train")
    if found:
        print(f"medtune: left over from another job, ignored: {', '.join(found)}", file=sys.stderr)
    for name in found:
        del os.environ[name]


def exit_with(status: int, *lines: str) -> NoReturn:
    """Ends the process with one line for each thing that is wrong."""
    for line in lines:
        print(f"medtune: {line}", file=sys.stderr)
    logging.shutdown()
    sys.exit(status)


def explain_hydra_error(error: BaseException, schema: type) -> str:
    """Returns Hydra's and OmegaConf's errors in one line that names the file and the key."""
    chain = [e for e in (error, error.__cause__, error.__context__) if e is not None]
    text = "\n".join(str(e) for e in chain)
    if swept := re.search(r"Ambiguous value for argument '(.*)'", text):
        return f"{swept[1]} has several values: add -m for a sweep, or brackets for a list"
    if option := re.search(r"Could not (?:find|load) '([\w/]+)/([^'/]+)'", text):
        return (
            experiment_with(option[1], option[2]) + f"{option[1]}={option[2]}: {suggest_option(option[1], option[2])}"
        )
    full_key = re.search(r"full_key: (\S+)", text)
    interpolation = any(isinstance(e, InterpolationResolutionError) for e in chain)
    if interpolation or not full_key:
        return text.splitlines()[0]
    key, file, value = full_key[1], re.search(r"In '(\S+?)'", text), re.search(r"Value '(.*?)'", text)
    if key.startswith("hydra."):
        places = [e.parent_node for e in chain if isinstance(e, ConfigAttributeError) and e.parent_node is not None]
        return unknown_to_hydra(key, list(places[0])) if places else text.splitlines()[0]
    where = ""
    if file and file[1].startswith("experiment/"):
        where = f"experiments/{file[1].removeprefix('experiment/')}.yaml: "
    elif file and file[1] != "run_schema":
        where = f"{CONF.name}/{file[1]}.yaml: "
    if not has_key(key, schema):
        return where + did_you_mean(key, schema)
    return where + (check_value(key, value[1] if value else "", schema) or text.splitlines()[0])


def unknown_to_hydra(key: str, beside: list[str]) -> str:
    """Returns the line for an unknown key of Hydra's own or a launcher's; `beside`: the right ones where it was looked
    for.
    """
    place, _, word = key.rpartition(".")
    near, known = difflib.get_close_matches(word, beside, n=1), (name for name in beside if name != "_target_")
    return f"{key}: did you mean {place}.{near[0]}?" if near else f"{key}: no such key; {place} has {', '.join(known)}"
