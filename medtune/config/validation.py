"""A composed configuration -> a `RunConfig`, or one line in the user's words for each mistake in it."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medtune.config.enums import QuantizationType, Weights
from medtune.config.keys import (
    dataclass_of,
    describe_type,
    did_you_mean,
    find_key,
    has_default,
    mapping_value_type,
    typed_fields,
)
from medtune.config.schema import BUNDLED, Data, RunConfig, Source
from medtune.runtime.errors import UserError

AnyRun = TypeVar("AnyRun", bound=RunConfig)


def build_config(cfg: DictConfig, schema: type[AnyRun], *, trains: bool = True) -> AnyRun:
    """Turns a composed configuration into a `RunConfig`, or what extends it, of plain Python values.

    `trains`: whether the run needs conversations to train on; an evaluation needs none.

    Raises `UserError` with one line for every value that is missing, unknown, of the wrong type or out of range, and
    for every combination that cannot work.
    """
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    problems = list(check_values(values, schema))
    if problems:
        raise UserError(*problems)
    run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    assert isinstance(run, schema)
    problems = list(check_combinations(run, trains))
    if problems:
        raise UserError(*problems)
    return run


def check_values(values: dict[Any, Any], schema: type, group: type | None = None, prefix: str = "") -> Iterator[str]:
    """Yields one line for each missing, unknown, mistyped or out-of-range value of a nested dictionary.

    `group`: the dataclass of the part of `schema` that is at `prefix`.
    """
    group = group or schema
    known = {f.name for f in fields(group)}
    node = OmegaConf.structured(group)  # one for all values of the group: making it takes longer than checking them
    for name in values:
        if name not in known:
            yield did_you_mean(prefix + str(name), schema)
    for entry, kind in typed_fields(group):
        path = prefix + entry.name
        if entry.name not in values and has_default(entry, kind):
            continue  # written before there was this key
        value = values.get(entry.name, MISSING)
        inner = dataclass_of(kind)
        if (member := mapping_value_type(kind)) and isinstance(value, dict):
            for name, values_of_member in value.items():
                yield from check_values(values_of_member, schema, member, f"{path}.{name}.")
        elif inner and isinstance(value, dict):
            yield from check_values(value, schema, inner, path + ".")
        elif not (inner and value is None and type(None) in get_args(kind)):
            problem = check_value(path, value, schema, node)
            if problem:
                yield problem


def check_value(path: str, value: Any, schema: type = RunConfig, node: Any = None) -> str | None:
    """Returns what is wrong with `value` at the dotted key `path`, in one line; None if nothing is.

    `node`: a structured configuration of the dataclass that holds the key, if there is one already.
    """
    group, entry, kind = find_key(path, schema)
    if value == MISSING:
        return f"{path} has no value: set {path}=… ({entry.metadata.get('doc', 'a group')})"
    if dataclass_of(kind):
        return f"{path} is a group, not a value: choose one with {path}=NAME, or set its keys, as {path}.KEY=…"
    try:
        # OmegaConf converts and checks exactly as the final merge will.
        node = OmegaConf.structured(group) if node is None else node
        node[entry.name] = value
        value = node[entry.name]
    except OmegaConfBaseException:
        return f"{path} must be {describe_type(kind)}, not {value!r}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} must be a finite number, not {value}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        bounds = entry.metadata["bounds"]
        outside = {
            "at least": lambda v, b: v < b,
            "above": lambda v, b: v <= b,
            "at most": lambda v, b: v > b,
            "below": lambda v, b: v >= b,
        }
        set_bounds = {word: bound for word, bound in bounds.items() if bound is not None}
        if any(outside[word](value, bound) for word, bound in set_bounds.items()):
            span = " and ".join(f"{word} {bound}" for word, bound in set_bounds.items())
            return f"{path} must be {span} ({entry.metadata['unit']}), not {value}"
    if isinstance(value, str) and re.fullmatch(r"hf_\w{20,}|wandb_v1_\w{20,}", value):
        return f"{path} looks like a secret, and the configuration is saved: use HF_TOKEN or WANDB_API_KEY instead"
    return None


def check_combinations(run: RunConfig, trains: bool) -> Iterator[str]:
    """Yields one line for each combination of valid values that cannot work together.

    `trains`: see `build_config`.
    """
    data, model = run.data, run.model
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", run.name):
        yield f"name={run.name}: results go to a folder of this name: use letters, digits, _, . and - only"
    yield from check_split_sizes(data, trains)
    yield from check_data_combinations(data)
    if model.weights is Weights.folder and model.path is None:
        yield "model.weights=folder needs model.path=FOLDER"
    if model.weights is not Weights.folder and model.path is not None:
        yield "model.path is only read with model.weights=folder"
    if model.weights is Weights.random and model.architecture is None:
        yield "model.weights=random needs model.architecture (LlamaConfig arguments)"
    if not model.stop_tokens:
        yield "model.stop_tokens is empty: no answer would ever end"
    if model.pad_token in model.stop_tokens:
        yield f"model.pad_token {model.pad_token} is also a stop token: the model would not learn to stop"
    if len(set(run.lora.target_modules)) < len(run.lora.target_modules):
        yield "lora.target_modules names a layer twice"
    if not run.lora.target_modules:
        yield "lora.target_modules is empty: nothing would train"
    if run.quantization and run.quantization.type is QuantizationType.int8 and run.quantization.double_quantization:
        yield "quantization.double_quantization works with nf4 and fp4 only, not with int8"
    if run.lora.use_dora and run.quantization and run.quantization.type is QuantizationType.int8:
        yield "lora.use_dora=true works with nf4, fp4 and none only, not with quantization=int8"
    if not run.eval.prompts and run.eval.held_out == 0 and run.eval.red_flags == 0:
        yield "eval.prompts is empty, eval.held_out and eval.red_flags are 0: there would be no answers to look at"


def check_split_sizes(data: Data, trains: bool) -> Iterator[str]:
    """Yields one line for each size of a split that cannot work. `trains`: see `build_config`."""
    sizes = {"validation_size": data.validation_size, "test_size": data.test_size}
    for name, size in sizes.items():
        if size > 1 and size != int(size):
            yield f"data.{name}={size}: up to 1 it is a share, from 2 on a whole number of conversations"
    if data.test_size == 1:  # the validation set is empty then, whatever its size
        if trains:
            yield "data.test_size=1: all of the data is the test set, which only medtune.evaluate takes"
    elif sum(size for size in sizes.values() if size <= 1) >= 1:
        yield "data.validation_size + data.test_size must be below 1, or nothing is left to train on"


def check_data_combinations(data: Data) -> Iterator[str]:
    """Yields one line for each thing in conf/data that cannot work, besides the sizes of the splits."""
    if data.members and (data.path or data.hub_id):
        yield "data.members: a mixture has no data of its own: data.members.NAME.path=FILE gives a member its file"
    sources = {f"data.members.{name}": member for name, member in data.members.items()} or {"data": data}
    for place, source in sources.items():
        yield from check_source_combinations(source, place)
    names = [member.name for member in data.members.values()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"data.members: two sources are called {name}: set data.members.….name"


def check_source_combinations(source: Source, place: str) -> Iterator[str]:
    """Yields one line for each thing that cannot work in the source at the dotted key `place`."""
    columns = source.columns
    if source.path is None and source.hub_id is None:
        command = f"{place}={source.name}" if place == "data" else place
        yield f"{command} needs a file: {place}.path=conversations.jsonl"
    elif source.name == "consultations" and not str(source.path).startswith(BUNDLED):
        yield f"{place}.path={source.path}: the bundled consultations have their own file; for yours add data=local"
    elif source.path is not None and not source.path.startswith(BUNDLED):
        path = Path(source.path).expanduser()
        if not path.is_file():
            yield f"{place}.path={source.path}: {'a folder, not a file' if path.exists() else 'no such file'}"
    if columns.messages and (columns.question or columns.answer):
        yield f"{place}.columns: give either messages, or question and answer, not both"
    elif bool(columns.question) != bool(columns.answer):
        missing = "answer" if columns.question else "question"
        yield f"{place}.columns: question and answer go together: name {place}.columns.{missing}=COLUMN too"
    if source.group_pattern is not None:
        try:
            if re.compile(source.group_pattern).groups != 1:
                yield f"{place}.group_pattern must have one group in brackets, the part of the question that names it"
        except re.error as error:
            yield f"{place}.group_pattern is no regular expression: {error}"
