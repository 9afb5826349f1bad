"""A run's folder: its lock, and run.json, which says what ran and how it ended."""

import logging
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medtune.config.schema import RunConfig
from medtune.config.serialize import config_diff, to_plain
from medtune.runtime.environment import git_commit, versions
from medtune.runtime.errors import RunFailed, RunPaused, UserError
from medtune.runtime.files import read_json, utc_now, write_json
from medtune.runtime.logs import FILE_ONLY
from medtune.runtime.status import FINISHED

log = logging.getLogger(__name__)

PACKAGES = (
    "medtune", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "hydra-core", "wandb",
)  # fmt: skip
SAME = {"data_fingerprint": "data", "base": "base"}  # what must not have changed when a run is resumed


class RunFolder:
    """The folder of one run, locked while the context lasts. `metadata` is the content of run.json.

    Resumes an unfinished run in the folder if its configuration is the same.
    """

    def __init__(self, run: RunConfig, out: Path) -> None:
        self.out = out
        self.metadata: dict[str, Any] = {
            "name": run.name,
            "status": "running",
            "error": None,
            "seed": run.seed,
            "started": utc_now(),
            "configuration": to_plain(run),
            "git_commit": git_commit(),
            "versions": versions(PACKAGES),
        }

    def __enter__(self) -> "RunFolder":
        self.began = time.monotonic()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.out / ".lock")
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.out} is in use by another process: wait for it, or choose another folder") from None
        except OSError as error:
            raise UserError(
                f"cannot write results to {self.out} ({error.strerror}): choose another folder, as hydra.run.dir=FOLDER"
            ) from None
        try:
            self.resume()
            self.write()
        except BaseException:
            self.lock.release()
            raise
        return self

    def resume(self) -> None:
        """Takes over what run.json says of an unfinished run in the folder. Raises `UserError` if it is another run."""
        self.before = require_same_run(self.out, self.metadata["configuration"])
        self.earlier = self.before.get("seconds") or 0.0  # spent before this process
        if self.before:
            kept = {name: self.before[name] for name in ("started", *SAME) if name in self.before}
            self.metadata |= kept | {"resumed": [*self.before.get("resumed", []), utc_now()]}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.conclude(error)
        finally:
            self.lock.release()

    def conclude(self, error: BaseException | None) -> None:
        """Writes how the run ended. Raises `RunFailed` unless the user caused the end or asked for it."""
        if error is None:
            return self.end("done")
        if isinstance(error, KeyboardInterrupt):
            self.end("interrupted", "stopped by the user or the system")
            log.warning("interrupted", extra=FILE_ONLY)
            return None
        if isinstance(error, RunPaused):
            return self.end("paused")
        if isinstance(error, UserError):
            self.end("refused", str(error))
            log.error("%s", error, extra=FILE_ONLY)
            return None
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        self.end("failed", line)
        log.error("%s", line, exc_info=error, extra=FILE_ONLY)
        raise RunFailed(f"{line} (traceback in {self.out / 'train.log'})") from error

    def record(self, metadata: dict[str, Any]) -> None:
        """Adds `metadata` to run.json. Raises `UserError` if the run that is resumed had other data or another base."""
        for name, what in SAME.items():
            if name in metadata and self.before.get(name, metadata[name]) != metadata[name]:
                raise UserError(
                    f"{self.out} was begun with other {what} than this: choose another folder to begin anew"
                )
        self.metadata |= metadata
        self.write()

    def end(self, status: str, error: str | None = None) -> None:
        """Writes the final status, and the seconds of all processes of the run."""
        seconds = round(self.earlier + time.monotonic() - self.began, 1)
        self.metadata |= {"status": status, "error": error, "seconds": seconds}
        self.write()

    def write(self) -> None:
        """Writes run.json."""
        write_json(self.out / "run.json", self.metadata)


def require_same_run(out: Path, configuration: dict[str, Any]) -> dict[str, Any]:
    """Returns run.json of the unfinished run in `out`, empty if there is none.

    Raises `UserError` if `out` holds a finished run, or one with another configuration.
    """
    if not (out / "run.json").exists():
        return {}
    before = read_json(out / "run.json")
    if before.get("status") in FINISHED or not before:
        raise UserError(f"{out} already holds a run, which would be overwritten: choose another folder")
    if changed := config_diff(before["configuration"], configuration):
        raise UserError(f"{out} holds an unfinished run that differs in {', '.join(changed)}: choose another folder")
    return before
