"""A run's folder explains itself: run.json says what it was and how it ended, metrics.json what came out."""

import logging
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medtune.config.schema import Run
from medtune.config.serialize import differences, plain
from medtune.runtime.environment import git_commit, versions
from medtune.runtime.errors import Failure, Paused, Refusal
from medtune.runtime.files import now, read_json, write_json
from medtune.runtime.logs import FILE_ONLY
from medtune.runtime.status import OVER

log = logging.getLogger(__name__)

PACKAGES = (
    "medtune", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "hydra-core", "wandb",
)  # fmt: skip


SAME = {"data_fingerprint": "data", "base": "base"}  # what a run that goes on must find as it was


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
