"""Configurations as plain data: their hash, and the keys in which two of them differ."""

import hashlib
import json
from dataclasses import is_dataclass
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


def to_plain(value: Any) -> Any:
    """Returns a configuration as JSON values: dataclasses become dictionaries, enum members their names."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(v) for name, v in vars(value).items()}
    if isinstance(value, dict):
        return {name: to_plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [to_plain(v) for v in value]
    return value.name if isinstance(value, Enum) else value
