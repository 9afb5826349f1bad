"""Checkpoints: a training state on disk that is complete or is not used.

The trainer writes the files of a checkpoint one after another into its folder. The manifest is written last and holds
the size and hash of each file. Only a checkpoint whose files match its manifest is resumed from.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class NoSpace(Exception):
    """The disk is too full for another checkpoint."""


def require_space(folder: Path, needed: int) -> None:
    """Raises `NoSpace` when fewer than `needed` bytes are free where `folder` is. Half a checkpoint is of no use."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(
            f"{free / 1e6:.0f} MB are free in {folder}, and a checkpoint takes {needed / 1e6:.0f} MB: free some and "
            "run the same command again"
        )


def write_manifest(checkpoint: Path) -> None:
    """Writes the manifest of a checkpoint whose files are all written, after the disk has them."""
    files = {}
    for path in sorted(checkpoint.iterdir()):
        if path.name != MANIFEST:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.name] = [path.stat().st_size, digest(path)]
    unfinished = checkpoint / f".{MANIFEST}"
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(files, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(checkpoint / MANIFEST)


def is_complete(checkpoint: Path) -> bool:
    """Returns whether every file of a checkpoint matches its manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return bool(files) and all(matches(checkpoint / name, size, sha256) for name, (size, sha256) in files.items())
    except (OSError, ValueError):
        return False


def matches(path: Path, size: int, sha256: str) -> bool:
    """Returns whether a file has a size in bytes and a hash. Raises `OSError` if it cannot be read."""
    return path.stat().st_size == size and digest(path) == sha256


@dataclass
class Saved:
    """A complete checkpoint and its training state (transformers.TrainerState as JSON)."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["global_step"]

    @property
    def finished(self) -> bool:
        """Whether training had ended, after its last step or by early stopping."""
        stopped = self.state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
        return stopped or self.step >= self.state["max_steps"]

    @property
    def evaluated(self) -> bool:
        """Whether it holds the evaluation due at its step. An interruption may have come before it."""
        due = self.step % self.state["eval_steps"] == 0 or self.step == self.state["max_steps"]
        evaluations = [entry["step"] for entry in self.state["log_history"] if "eval_loss" in entry]
        return not due or self.step in evaluations


def latest_complete(folder: Path) -> Saved | None:
    """Returns the newest complete checkpoint in `folder`, or None. Removes newer ones that are not complete."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        if is_complete(checkpoint):
            return Saved(checkpoint, json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
        log.warning("%s is not complete: removed", checkpoint.name)
        shutil.rmtree(checkpoint)
    return None


def prune(folder: Path, steps: set[int]) -> None:
    """Removes all checkpoints in `folder` but those of `steps`."""
    for checkpoint in folder.glob("checkpoint-*"):
        if step_of(checkpoint) not in steps:
            shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """Returns the optimizer step at which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def digest(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
