"""Configurations as plain data: their hash, and the keys in which two of them differ."""

import hashlib
import json
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any

TRACKING_KEYS = ("name.", "wandb.")  # keys that say where a run is recorded, and change nothing in it


def config_diff(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns what two configurations do not agree in, as 'lora.r (16, now 32)'; where a run is recorded does not
    count.
    """
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += config_diff(old, new, f"{prefix}{name}.")
        elif old != new and not f"{prefix}{name}.".startswith(TRACKING_KEYS):
            found.append(f"{prefix}{name} ({old}, now {new})")
    return found


def config_hash(configuration: dict[str, Any]) -> str:
    """Returns a name for a run: equal when its configuration is, wherever it is recorded."""
    told = {name: value for name, value in configuration.items() if f"{name}." not in TRACKING_KEYS}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def is_default(group: Any, entry: Field) -> bool:
    """Returns whether a group has the default of one of its keys, as `schema.key` declares it."""
    if entry.default_factory is not MISSING:
        return bool(entry.metadata) and getattr(group, entry.name) == entry.default_factory()
    return getattr(group, entry.name) == entry.default


def to_plain(value: Any) -> Any:
    """Returns a configuration as JSON values: dataclasses become dictionaries, enum members their names.

    A key that has a default is left out where it has that value: what was written before there was the key stays equal.
    """
    if is_dataclass(value) and not isinstance(value, type):
        chosen = {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if not is_default(value, f)}
        return {name: v for name, v in chosen.items() if v != {} or not is_dataclass(getattr(value, name))}
    if isinstance(value, dict):
        return {name: to_plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [to_plain(v) for v in value]
    return value.name if isinstance(value, Enum) else value
