"""A run's folder explains itself: run.json says what it was and how it ended, metrics.json what came out."""

import contextlib
import json
import logging
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import is_dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medtune.config import Refusal, Run

log = logging.getLogger(__name__)

PACKAGES = (
    "medtune", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "hydra-core", "wandb",
)  # fmt: skip


FILE_ONLY = {"file_only": True}


class OnScreen(logging.Filter):
    """Keeps from the screen what is for train.log only: the command line says it in one line of its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(record, "file_only", False)


class Failure(Exception):
    """A run started and did not finish; its folder holds the traceback."""


class Result:
    """The folder of one run. `facts` is what run.json will say besides status and times."""

    def __init__(self, run: Run, out: Path) -> None:
        self.out = out
        self.facts: dict[str, Any] = {
            "name": run.name,
            "status": "running",
            "error": None,
            "seed": run.seed,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "configuration": plain(run),
            "git_commit": git_commit(),
            "versions": versions(PACKAGES),
        }

    def __enter__(self) -> "Result":
        self.began = time.monotonic()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            # "x": two runs in one folder would mix their results.
            (self.out / "run.json").open("x").close()
        except FileExistsError:
            raise Refusal(
                f"{self.out} already holds a run, which would be overwritten: choose another hydra.run.dir"
            ) from None
        except OSError as error:
            raise Refusal(
                f"cannot write results to {self.out} ({error.strerror}): choose another folder, as hydra.run.dir=FOLDER"
            ) from None
        self.write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return self.end("done")
        if isinstance(error, KeyboardInterrupt):
            self.end("interrupted", "stopped by the user or the system")
            log.warning("interrupted", extra=FILE_ONLY)
            return None
        if isinstance(error, Refusal):
            self.end("refused", str(error))
            log.error("%s", error, extra=FILE_ONLY)
            return None
        line = f"{kind.__name__ if kind else ''}: {error}".splitlines()[0]
        self.end("failed", line)
        log.error("%s", line, exc_info=error, extra=FILE_ONLY)
        raise Failure(f"{line} (traceback in {self.out / 'train.log'})") from error

    def end(self, status: str, error: str | None = None) -> None:
        self.facts |= {"status": status, "error": error, "seconds": round(time.monotonic() - self.began, 1)}
        self.write()

    def write(self) -> None:
        """Write run.json as it stands."""
        write_json(self.out / "run.json", self.facts)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader, or a crash, never meets half a file."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def plain(value: Any) -> Any:
    """A configuration as JSON values: dataclasses become dictionaries, enum members their names."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(v) for name, v in vars(value).items()}
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.name if isinstance(value, Enum) else value


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty if there is no complete one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def git_commit() -> str | None:
    """The commit of the checkout medtune runs from, '+changes' if files differ from it; None for an installed wheel."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parent:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
