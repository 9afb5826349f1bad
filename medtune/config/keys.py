"""The keys of the configuration by their dotted path, and what to say about one that does not exist.

`schema` is the dataclass of a command's whole configuration: `RunConfig`, or one that extends it.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING as OMITTED

from medtune.config.schema import RunConfig, Source


def all_keys(schema: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key of the schema, groups included."""
    for entry, kind in typed_fields(schema):
        yield prefix + entry.name
        if inner := dataclass_of(kind):
            yield from all_keys(inner, f"{prefix}{entry.name}.")


def find_key(path: str, schema: type = RunConfig) -> tuple[type, Field, Any]:
    """Returns the dataclass that holds the dotted key `path`, its field there, and the field's type. Raises
    KeyError.
    """
    *groups, last = path.split(".")
    members: type | None = None  # what a mapping's values are, after its name and before a value's
    for name in groups:
        if members:
            schema, members = members, None
            continue
        kind = dict((f.name, kind) for f, kind in typed_fields(schema))[name]
        members, inner = mapping_value_type(kind), dataclass_of(kind)
        if members is None and inner is None:
            raise KeyError(path)
        schema = inner or schema
    if members:
        raise KeyError(path)
    for entry, kind in typed_fields(schema):
        if entry.name == last:
            return schema, entry, kind
    raise KeyError(path)


def has_key(path: str, schema: type = RunConfig) -> bool:
    """Returns whether the schema has the dotted key `path`."""
    try:
        return bool(find_key(path, schema))
    except KeyError:
        return False


def has_default(entry: Field, kind: Any) -> bool:
    """Returns whether a key need not be given: `schema.key` declares a default, or does for all keys of a group."""
    if inner := dataclass_of(kind):
        return all(has_default(f, k) for f, k in typed_fields(inner))
    return bool(entry.metadata) and entry.default != OMITTED


def is_mapping(path: str) -> bool:
    """Returns whether the key holds a mapping with names of its own, as model.architecture and data.members do."""
    return has_key(path) and any(get_origin(k) is dict for k in (find_key(path)[2], *get_args(find_key(path)[2])))


def did_you_mean(path: str, schema: type = RunConfig) -> str:
    """Returns the line for an unknown key, naming the nearest right one."""
    candidates = list(all_keys(schema))
    if member := re.match(r"data\.members\.[^.]+\.", path):
        candidates = list(all_keys(Source, member[0]))
    near = difflib.get_close_matches(path.lower(), candidates, n=1, cutoff=0.75)
    if not near:  # the right word in the wrong place: learning_rate for trainer.learning_rate
        last = path.lower().rsplit(".", 1)[-1]
        words = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        near = [words[word] for word in difflib.get_close_matches(last, words, n=1, cutoff=0.6)]
    return f"{path}: did you mean {near[0]}?" if near else f"{path}: no such key; --cfg job shows them all"


def typed_fields(schema: type) -> list[tuple[Field, Any]]:
    """Returns the fields of a dataclass with their types."""
    hints = get_type_hints(schema)
    return [(f, hints[f.name]) for f in fields(schema)]


def dataclass_of(kind: Any) -> type | None:
    """Returns the dataclass that a field's type is, or may be."""
    if get_origin(kind) is dict:
        return None
    return next((k for k in (kind, *get_args(kind)) if isinstance(k, type) and is_dataclass(k)), None)


def mapping_value_type(kind: Any) -> type | None:
    """Returns the dataclass that the values of a mapping are."""
    return dataclass_of(get_args(kind)[1]) if get_origin(kind) is dict else None


def describe_type(kind: Any) -> str:
    """Returns a type in the user's words."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(member.name for member in kind)
    if get_origin(kind) is list:
        return "a list, as [a,b]"
    if get_origin(kind) is dict:
        return "a mapping, as {a:1}"
    if type(None) in get_args(kind):
        return describe_type(next(k for k in get_args(kind) if k is not type(None))) + " or null"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
