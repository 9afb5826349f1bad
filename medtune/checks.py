"""A composed configuration -> a `Run`, or one line in the user's words for everything that is wrong with it."""

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medtune.config import QuantizationType, Refusal, Run, Source, Weights


def typed(cfg: DictConfig) -> Run:
    """Turn a composed configuration into a `Run` of plain Python values.

    Raises `Refusal` with one line for every value that is missing, unknown, of the wrong type or out of range, and for
    every combination that cannot work.
    """
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    problems = list(problems_in(values))
    if problems:
        raise Refusal(*problems)
    run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), values))
    assert isinstance(run, Run)
    problems = list(impossible(run))
    if problems:
        raise Refusal(*problems)
    return run


def problems_in(values: dict[Any, Any], schema: type = Run, prefix: str = "") -> Iterator[str]:
    """One line for each missing, unknown, mistyped or out-of-range value of a nested dictionary."""
    known = {f.name for f in fields(schema)}
    for name in values:
        if name not in known:
            yield did_you_mean(prefix + str(name))
    for entry, kind in typed_fields(schema):
        path = prefix + entry.name
        value = values.get(entry.name, MISSING)
        inner = nested(kind)
        if inner and isinstance(value, dict):
            yield from problems_in(value, inner, path + ".")
        elif not (inner and value is None and type(None) in get_args(kind)):
            problem = problem_with(path, value)
            if problem:
                yield problem


def problem_with(path: str, value: Any) -> str | None:
    """What is wrong with `value` at the dotted key `path`, in one line; None if nothing is."""
    schema, entry, kind = lookup(path)
    if value == MISSING:
        return f"{path} has no value: set {path}=… ({entry.metadata.get('doc', 'a group')})"
    if nested(kind):
        return f"{path} is a group, not a value: choose one with {path}=NAME, or set its keys, as {path}.KEY=…"
    try:
        # A fresh structured config per value: OmegaConf converts and checks exactly as the final merge will.
        node = OmegaConf.structured(schema)
        node[entry.name] = value
        value = OmegaConf.to_container(node)[entry.name]  # type: ignore[index, call-overload]
    except OmegaConfBaseException:
        return f"{path} must be {spoken(kind)}, not {value!r}"
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


def impossible(run: Run) -> Iterator[str]:
    """One line for each combination of valid values that cannot work together."""
    data, model, columns = run.data, run.model, run.data.columns
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", run.name):
        yield f"name={run.name}: results go to a folder of this name: use letters, digits, _, . and - only"
    if data.validation_fraction + data.test_fraction >= 1:
        yield "data.validation_fraction + data.test_fraction must be below 1, or nothing is left to train on"
    if data.source is Source.local:
        if data.path is None:
            yield "data=local needs a file: data.path=conversations.jsonl"
        elif not Path(data.path).expanduser().is_file():
            there = Path(data.path).expanduser().exists()
            yield f"data.path={data.path}: {'a folder, not a file' if there else 'no such file'}"
        if columns.messages and (columns.question or columns.answer):
            yield "data.columns: give either messages, or question and answer, not both"
        if not columns.messages and not (columns.question and columns.answer):
            yield "data.columns: say where the text is: messages=COLUMN, or question=COLUMN and answer=COLUMN"
    elif data.path is not None:
        yield "data.path is only read by data=local"
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
    if not run.samples.prompts and run.samples.held_out == 0:
        yield "samples.prompts is empty and samples.held_out is 0: there would be no answers to look at"


def keys(schema: type = Run, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, groups included."""
    for entry, kind in typed_fields(schema):
        yield prefix + entry.name
        if inner := nested(kind):
            yield from keys(inner, f"{prefix}{entry.name}.")


def lookup(path: str) -> tuple[type, Field, Any]:
    """The dataclass that holds the dotted key `path`, its field there, and the field's type. Raises KeyError."""
    schema: type = Run
    *groups, last = path.split(".")
    for name in groups:
        inner = nested(dict((f.name, kind) for f, kind in typed_fields(schema))[name])
        if inner is None:
            raise KeyError(path)
        schema = inner
    for entry, kind in typed_fields(schema):
        if entry.name == last:
            return schema, entry, kind
    raise KeyError(path)


def is_mapping(path: str) -> bool:
    """Whether the key holds a mapping with names of its own, as model.architecture does."""
    return path in keys() and any(get_origin(k) is dict for k in (lookup(path)[2], *get_args(lookup(path)[2])))


def did_you_mean(path: str) -> str:
    """The line for an unknown key, naming the nearest right one."""
    candidates = list(keys())
    near = difflib.get_close_matches(path.lower(), candidates, n=1, cutoff=0.75)
    if not near:  # the right word in the wrong place: learning_rate for trainer.learning_rate
        last = path.lower().rsplit(".", 1)[-1]
        words = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        near = [words[word] for word in difflib.get_close_matches(last, words, n=1, cutoff=0.6)]
    return f"{path}: did you mean {near[0]}?" if near else f"{path}: no such key; --cfg job shows them all"


def typed_fields(schema: type) -> list[tuple[Field, Any]]:
    """The fields of a dataclass with their types."""
    hints = get_type_hints(schema)
    return [(f, hints[f.name]) for f in fields(schema)]


def nested(kind: Any) -> type | None:
    """The dataclass that a field's type is, or may be."""
    return next((k for k in (kind, *get_args(kind)) if isinstance(k, type) and is_dataclass(k)), None)


def spoken(kind: Any) -> str:
    """A type in the user's words."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(member.name for member in kind)
    if get_origin(kind) is list:
        return "a list, as [a,b]"
    if get_origin(kind) is dict:
        return "a mapping, as {a:1}"
    if type(None) in get_args(kind):
        return spoken(next(k for k in get_args(kind) if k is not type(None))) + " or null"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
