"""The folder of a saved adapter -> its files, or an error that says what is wrong with them."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from medtune.runtime.errors import UserError


def weights_of(folder: Path) -> Path:
    """Returns the file of the weights, as PEFT names it."""
    return folder / "adapter_model.safetensors"


def config_of(folder: Path) -> Path:
    """Returns the file of rank, scale and target modules, as PEFT names it."""
    return folder / "adapter_config.json"


def require_whole(folder: Path, hub_id: str) -> None:
    """Raises `UserError` unless `folder` holds a complete adapter of the base `hub_id`; reads headers only."""
    config, weights = config_of(folder), weights_of(folder)
    if not weights.is_file() or not config.is_file():
        missing = weights if not weights.is_file() else config
        raise UserError(
            f"{folder}: no adapter there ({missing.name} is missing): the run did not finish, or it was moved"
        )
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        base, _ = settings["base_model_name_or_path"], settings["peft_type"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{config} is damaged: copy the folder again, or train again") from None
    try:
        with safe_open(weights, "np") as tensors:
            names = list(tensors.keys())
    except SafetensorError as error:
        raise UserError(f"{weights} is damaged or cut off ({error}): copy it again, or train again") from None
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: tokenizer.json is missing: copy the folder again")
    if not names:
        raise UserError(f"{weights} holds no weights: train again")
    if base != hub_id:
        raise UserError(f"{folder} is an adapter of {base}, not of {hub_id}: choose its base with model=…")
