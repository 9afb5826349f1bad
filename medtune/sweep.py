"""Members of a sweep -> one result folder each, a ledger, and a table at the end.

Every member is checked before the first trains; one member's failure never stops the others.
"""

import gc
import logging
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medtune.config import Refusal
from medtune.result import Failure, read_json, write_json

log = logging.getLogger(__name__)


def run_members(
    sweep: Path, folders: Sequence[Path], overrides: Sequence[str], run: Callable[[int], BaseException | None]
) -> None:
    """Call `run(i)` for each member in turn; it returns the exception that ended the member, or None.

    Keeps `sweep.json` in the sweep's folder up to date and prints the comparison. Raises `Failure`, naming every member
    that did not finish, after all have had their turn.
    """
    errors: dict[int, str] = {}
    try:
        for i, name in enumerate(overrides):
            log.info("member %s of %s: %s", i + 1, len(overrides), name)
            error = run(i)
            if error is not None:
                log.error("member %s did not finish: %s", i + 1, error)
                errors[i] = (str(error) or type(error).__name__).splitlines()[0]
                # The traceback's frames would keep the failed member's model in memory.
                traceback.clear_frames(error.__traceback__)
                del error
            gc.collect()  # a model is part of reference cycles: without this the next member meets it in memory
            write_ledger(sweep, folders, overrides)
    finally:
        write_ledger(sweep, folders, overrides)
        from medtune.comparison import summary  # reads Parquet: nothing that a mistyped sweep should wait for

        print(summary(folders), flush=True)
    if errors:
        failed = [f"{overrides[i]}: {line}" for i, line in errors.items()]
        raise Failure("\n".join([f"{len(errors)} of {len(overrides)} members failed", *failed]))


def write_ledger(sweep: Path, folders: Sequence[Path], overrides: Sequence[str]) -> None:
    """sweep.json: one row per member with its overrides, folder, status and best validation loss."""
    rows: list[dict[str, Any]] = []
    for folder, override in zip(folders, overrides, strict=True):
        run, metrics = read_json(folder / "run.json"), read_json(folder / "metrics.json")
        rows.append(
            {
                "overrides": override,
                "folder": folder.name,
                "status": run.get("status", "not started"),
                "error": run.get("error"),
                "seconds": run.get("seconds"),
                "eval_loss": metrics["best"]["eval_loss"] if "best" in metrics else None,
            }
        )
    write_json(sweep / "sweep.json", {"members": rows})


def labels(overrides: Sequence[Sequence[str]]) -> list[str]:
    """What tells members apart: of each member's overrides those that are not the same for all."""
    differing = [place for place, values in enumerate(zip(*overrides, strict=True)) if len(set(values)) > 1]
    return [",".join(words[place] for place in differing) or ",".join(words) for words in overrides]


def require_distinct(sweep: Path, folders: Sequence[Path], overrides: Sequence[str]) -> None:
    """Raises `Refusal` when two members would write into one folder, or the sweep's folder holds a sweep already."""
    if (sweep / "sweep.json").exists():
        raise Refusal(f"{sweep} already holds a sweep, which would be overwritten: choose another hydra.sweep.dir")
    seen: dict[Path, str] = {}
    for folder, override in zip(folders, overrides, strict=True):
        if folder in seen:
            raise Refusal(f"two members are the same: {seen[folder]} and {override}")
        if (folder / "run.json").exists():
            raise Refusal(f"{folder} already holds a run, which would be overwritten: choose another hydra.sweep.dir")
        seen[folder] = override
