"""The overrides that the user typed: completed, and every mistake that shows in them one line in the user's words."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, ValueType
from hydra.errors import HydraException

from medtune.config.groups import RENAMED, group_names, group_options, suggest_option, sweeps
from medtune.config.keys import did_you_mean, has_key, is_mapping
from medtune.config.schema import RunConfig
from medtune.config.validation import check_value
from medtune.runtime.errors import UserError
from medtune.runtime.files import read_json
from medtune.runtime.pasting import hydra_quoted
from medtune.runtime.pasting import override as typed
from medtune.runtime.status import FINISHED

HYDRAS = [entry.name for entry in fields(HydraConf)]
CHDIR = "hydra.job.chdir=true: relative paths would be looked for in the result folder: leave it out"


def resume_sweep_overrides(words: list[str]) -> list[str]:
    """Returns the overrides of a command with `sweep=FOLDER`; with nothing but Hydra's own beside it, also those by
    which the sweep in it was begun.

    Raises `UserError` when there is none.
    """
    named = named_sweep(next(word for word in words if word.startswith("sweep=")))
    folder = Path(named).expanduser()
    given = [word for word in words if not word.startswith("sweep=")]
    if not named:
        raise UserError("sweep= names no folder: sweep=multirun/medtune/TIME")
    if all(word.startswith("hydra") for word in given):  # how it is run, not what
        known = read_json(folder / "sweep.json").get("command")
        if known is None:
            raise UserError(f"sweep={named}: no sweep in it to go on with: name a folder that holds a sweep.json")
        anew = {word.partition("=")[0] for word in given}
        begun = [RENAMED.get(word, word) for word in known]  # by an earlier medtune, perhaps
        given = [*(word for word in map(quoted, begun) if word.partition("=")[0] not in anew), *given]
    return [*given, f"hydra.sweep.dir={hydra_quoted(str(folder))}"]


def needs_sweep(words: Sequence[str]) -> str | None:
    """Returns the first override that says how the members of a sweep run, unless one of the experiments sweeps."""
    experiments = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
    if "hydra.mode=MULTIRUN" in words or any(map(sweeps, experiments)):
        return None
    return next((word for word in words if word.startswith(("hydra.launcher.", "hydra.sweeper."))), None)


def named_sweep(word: str) -> str:
    """Returns the folder that `sweep=FOLDER` names, in Hydra's quotes or without."""
    try:
        value = OverridesParser.create().parse_override(quoted(word)).value()
    except HydraException:
        value = word.partition("=")[2].strip("'\"")
    return "" if value is None else str(value)


def quoted(word: str) -> str:
    """Returns an override whose value has an = in it, as members' folders have, in the quotes that Hydra needs to read
    it.
    """
    name, _, value = word.partition("=")
    function = re.match(r"\w+\(", value)  # of Hydra's grammar: glob(*,exclude=a*)
    if "=" not in value or function or re.search(r"""['"{$]""", value):
        return word
    if listed := re.fullmatch(r"\[(.*)\]", value):
        return f"{name}=[{','.join(repr(part.strip()) for part in listed[1].split(','))}]"
    return f"{name}='{value}'" if "[" not in value else word


def constant_keys(words: Sequence[str]) -> list[str]:
    """Returns the keys that have one value for all members of a sweep; none if there is no sweep."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    task = [override for override in parsed if not override.is_hydra_override()]
    if not any(override.is_sweep_override() for override in task):
        return []
    return [override.get_key_element() for override in task if not override.is_sweep_override()]


def check_overrides(words: list[str], schema: type) -> Iterator[str]:
    """Yields one line for each override that cannot be right, before Hydra composes anything."""
    parser = OverridesParser.create()
    if "=" in words:
        yield "write key=value without spaces around the ="
        return
    for word in words:
        if has_key("run", schema) and Path(word).is_dir():
            yield f"{word}: did you mean {typed('run', word)}?"
            continue
        try:
            override = parser.parse_override(word)
        except HydraException:
            name, equals, value = word.partition("=")
            hint = f"""quote the value twice, as '{name}="{value}"'""" if equals else f"did you mean {word}=…?"
            yield f"{word}: not of the form key=value; {hint}"
            continue
        name = override.key_or_group
        if override.is_sweep_override() and schema is not RunConfig:
            yield several_values(override)
        elif override.is_delete() and is_mapping(name.rpartition(".")[0]):
            continue  # a member of a mixture
        elif override.is_delete():
            yield f"{word}: nothing can be taken out of a run; change it, as {word.strip('~')}=…"
        elif name.startswith("hydra"):
            yield from check_hydra_override(override)
        elif name in group_names() and override.is_add() and not override.package:
            yield f"{word}: leave the + out: {word.lstrip('+')}"
        elif name in group_names():
            yield from unknown_options(override)
        elif name == "sweep":
            yield f"{word}: medtune.train resumes a sweep so; here name it with run=FOLDER"
        elif override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            yield f"{word}: glob() chooses among the options of a group: give a key its values, as {name}=1,2"
        elif is_mapping(name.rpartition(".")[0]):
            continue  # its names are another library's: Hydra says what is wrong with them
        elif not has_key(name, schema):
            near = difflib.get_close_matches(name, group_names(), n=1)
            yield f"{name}: did you mean {near[0]}?" if near and "." not in name else did_you_mean(name, schema)
        else:
            for value in values_of(override):
                problem = check_value(name, value, schema)
                if problem:
                    yield problem


def check_hydra_override(override: Override) -> Iterator[str]:
    """Yields a line for an override of Hydra's own keys that cannot be right."""
    name, value = override.key_or_group, override.value()
    if name == "hydra.run.dir" and is_over(Path(str(value))):
        # Here, because Hydra writes its own files into the folder before the run could refuse.
        yield f"{value} already holds a run, which would be overwritten: choose another hydra.run.dir"
    elif name == "hydra.job.chdir" and value is True:
        yield CHDIR
    elif name == "hydra.sweep.subdir":
        yield f"{name}: members are called by what differs between them, and found by it when resumed: leave it out"
    elif name in ("hydra/job_logging", "hydra/hydra_logging") and value != "default":
        yield f"{name}: medtune has a log of its own, on the screen and in train.log: leave it out"
    elif override.input_line in RENAMED:
        yield f"{override.input_line}: {suggest_option(name, str(value))}"
    elif name.startswith("hydra.") and (part := name.split(".")[1]) not in HYDRAS:
        near = difflib.get_close_matches(part, HYDRAS, n=1)
        yield f"{name}: did you mean hydra.{near[0]}?" if near else f"{name}: Hydra has no such key"


def is_over(folder: Path) -> bool:
    """Returns whether a folder holds a run that nothing is left to do of, or whose run.json cannot be read."""
    return (folder / "run.json").exists() and read_json(folder / "run.json").get("status", "done") in FINISHED


def several_values(override: Override) -> str:
    """Returns the line for a key with several values in a command that takes one of each."""
    key = override.key_or_group
    values = [str(value) for value in values_of(override)]
    if key == "run":
        return f"run has several values: put them in brackets, as {typed(key, *values)}"
    return f"{key} has several values: give it one (a list stands in brackets)"


def unknown_options(override: Override) -> Iterator[str]:
    """Yields one line for each choice that a group does not have, and for experiments that cannot be swept."""
    group = override.key_or_group
    choices = [str(value) for value in values_of(override)]
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP and not choices:
        yield f"{override.input_line}: matches none of {', '.join(group_options(group))}"
    if group == "experiment" and override.is_sweep_override() and (sweeping := [c for c in choices if sweeps(c)]):
        alone = "; ".join(f"python -m medtune.train experiment={choice}" for choice in choices)
        yield f"experiment: with a sweep of its own ({', '.join(sweeping)}) one cannot be swept: {alone}"
    for choice in choices:
        if choice not in group_options(group):
            yield f"{group}={'null' if choice == 'None' else choice}: {suggest_option(group, choice)}"


def values_of(override: Override) -> list[Any]:
    """Returns the values an override gives its key: one, or several in a sweep. Interpolations are left to Hydra."""
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return list(cast(Glob, override._value).filter(group_options(override.key_or_group)))
    if override.is_sweep_override():
        if override.is_choice_sweep() or override.is_range_sweep():
            return [plain(value) for value in override.sweep_iterator()]
        return []  # interval() is the sweeper's
    value = override.value()
    return [] if isinstance(value, str) and "${" in value else [value]


def plain(value: Any) -> Any:
    """Returns a value of Hydra's grammar as Python has it: quotes are for the grammar alone."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain(part) for part in value]
    return {plain(key): plain(part) for key, part in value.items()} if isinstance(value, dict) else value
