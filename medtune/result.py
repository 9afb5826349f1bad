"""A run's folder explains itself: run.json says what it was and how it ended, metrics.json what came out."""

import contextlib
import hashlib
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

from filelock import FileLock, Timeout

from medtune.config import Refusal, Run
from medtune.logs import FILE_ONLY

log = logging.getLogger(__name__)

PACKAGES = (
    "medtune", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "hydra-core", "wandb",
)  # fmt: skip
OVER = ("done", "pruned")  # statuses after which nothing is left to do
RECORDED = ("name.", "wandb.")  # keys that say where a run is recorded, and change nothing in it


SAME = {"data_fingerprint": "data", "base": "base"}  # what a run that goes on must find as it was


class Failure(Exception):
    """A run started and did not finish; its folder holds the traceback."""


class Paused(Exception):
    """A run was asked to stop at an evaluation, and can go on from there."""


class Result:
    """The folder of one run. `facts` is what run.json will say besides status and times.

    A folder whose run did not finish is taken up again, if its configuration is the same.
    """

    def __init__(self, run: Run, out: Path) -> None:
        self.out = out
        self.facts: dict[str, Any] = {
            "name": run.name,
            "status": "running",
            "error": None,
            "seed": run.seed,
            "started": now(),
            "configuration": plain(run),
            "git_commit": git_commit(),
            "versions": versions(PACKAGES),
        }

    def __enter__(self) -> "Result":
        self.began = time.monotonic()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.out / ".lock")
            self.lock.acquire(timeout=0)
        except Timeout:
            raise Refusal(f"{self.out} is in use by another process: wait for it, or choose another folder") from None
        except OSError as error:
            raise Refusal(
                f"cannot write results to {self.out} ({error.strerror}): choose another folder, as hydra.run.dir=FOLDER"
            ) from None
        try:
            self.before = require_same_run(self.out, self.facts["configuration"])
            if self.before:
                kept = {name: self.before[name] for name in ("started", *SAME) if name in self.before}
                self.facts |= kept | {"resumed": [*self.before.get("resumed", []), now()]}
            self.earlier = self.before.get("seconds") or 0.0
            self.write()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.conclude(error)
        finally:
            self.lock.release()

    def conclude(self, error: BaseException | None) -> None:
        """Write how the run ended. Raises `Failure` for what is neither the user's mistake nor their wish."""
        if error is None:
            return self.end("done")
        if isinstance(error, KeyboardInterrupt):
            self.end("interrupted", "stopped by the user or the system")
            log.warning("interrupted", extra=FILE_ONLY)
            return None
        if isinstance(error, Paused):
            return self.end("paused")
        if isinstance(error, Refusal):
            self.end("refused", str(error))
            log.error("%s", error, extra=FILE_ONLY)
            return None
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        self.end("failed", line)
        log.error("%s", line, exc_info=error, extra=FILE_ONLY)
        raise Failure(f"{line} (traceback in {self.out / 'train.log'})") from error

    def record(self, facts: dict[str, Any]) -> None:
        """Add to run.json.

        Raises `Refusal` when this run began with other data or another base: this would not be its continuation.
        """
        for name, what in SAME.items():
            if name in facts and self.before.get(name, facts[name]) != facts[name]:
                raise Refusal(f"{self.out} was begun with other {what} than this: choose another folder to begin anew")
        self.facts |= facts
        self.write()

    def end(self, status: str, error: str | None = None) -> None:
        seconds = round(self.earlier + time.monotonic() - self.began, 1)
        self.facts |= {"status": status, "error": error, "seconds": seconds}
        self.write()

    def write(self) -> None:
        """Write run.json as it stands."""
        write_json(self.out / "run.json", self.facts)


def require_same_run(out: Path, configuration: dict[str, Any]) -> dict[str, Any]:
    """run.json of the unfinished run that a folder holds; empty if it holds none.

    Raises `Refusal` when it holds a finished run, or one of another configuration.
    """
    if not (out / "run.json").exists():
        return {}
    before = read_json(out / "run.json")
    if before.get("status") in OVER or not before:
        raise Refusal(f"{out} already holds a run, which would be overwritten: choose another folder")
    if changed := differences(before["configuration"], configuration):
        raise Refusal(f"{out} holds an unfinished run that differs in {', '.join(changed)}: choose another folder")
    return before


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What two configurations do not agree in, as 'lora.r (16, now 32)'; where a run is recorded does not count."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new and not f"{prefix}{name}.".startswith(RECORDED):
            found.append(f"{prefix}{name} ({old}, now {new})")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader, or a crash, never meets half a file."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def hash_of(configuration: dict[str, Any]) -> str:
    """A name for a run: equal when its configuration is, wherever it is recorded."""
    told = {name: value for name, value in configuration.items() if f"{name}." not in RECORDED}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def now() -> str:
    """The time, as run.json has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, but not a last line that was cut off; none if there is no file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


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
