"""A training state on disk: complete or not there.

The trainer writes a checkpoint's files one after another, straight into its folder. A manifest with the size and hash
of each of them, written last, is what makes it one that may be resumed from.
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
    """Raises `NoSpace` when fewer than `needed` bytes are free where `folder` is: half a checkpoint helps nobody."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(
            f"{free / 1e6:.0f} MB are free in {folder}, and a checkpoint takes {needed / 1e6:.0f} MB: free some and "
            "run the same command again"
        )


def write_manifest(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint whose files are all written, and wait until the disk has them."""
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
    """Whether every file of a checkpoint is what its manifest says."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return bool(files) and all(
            (checkpoint / name).stat().st_size == size and digest(checkpoint / name) == sha256
            for name, (size, sha256) in files.items()
        )
    except (OSError, ValueError):
        return False


@dataclass
class Saved:
    """A complete checkpoint, and the trainer's state in it (transformers.TrainerState as JSON)."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["global_step"]

    @property
    def finished(self) -> bool:
        """Whether training had come to its end: all steps, or stopped early."""
        stopped = self.state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
        return stopped or self.step >= self.state["max_steps"]

    @property
    def evaluated(self) -> bool:
        """Whether the evaluation that was due at its step is in it: an interruption may have come before."""
        due = self.step % self.state["eval_steps"] == 0 or self.step == self.state["max_steps"]
        return not due or any(e["step"] == self.step and "eval_loss" in e for e in self.state["log_history"])


def latest_complete(folder: Path) -> Saved | None:
    """The newest complete checkpoint of a run, None if there is none; newer ones that are not complete are removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        if is_complete(checkpoint):
            return Saved(checkpoint, json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
        log.warning("%s is not complete: removed", checkpoint.name)
        shutil.rmtree(checkpoint)
    return None


def prune(folder: Path, steps: set[int]) -> None:
    """Remove the checkpoints of all other steps."""
    for checkpoint in folder.glob("checkpoint-*"):
        if step_of(checkpoint) not in steps:
            shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when it was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
