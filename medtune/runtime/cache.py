"""A cache on disk for what takes long to make and is the same every time."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from medtune.runtime.errors import UserError


def cache_folder() -> Path:
    """Returns the folder for converted weights and prepared data: MEDTUNE_CACHE, or ~/.cache/medtune."""
    return Path(os.environ.get("MEDTUNE_CACHE") or Path.home() / ".cache" / "medtune").expanduser()


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Returns the folder `name` of the cache, filled by `make(folder)` if it is not there.

    It appears under its name only when complete, and two processes do not make it twice. Raises `UserError` if the
    cache cannot be written.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
                try:
                    make(unfinished)
                    unfinished.chmod(0o755)  # mkdtemp's folders are private, a cache may be shared
                    unfinished.rename(folder)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if error.errno is None:  # transformers' own, about the model
            raise
        raise UserError(f"cannot write the cache {folder.parent} ({error.strerror}): set MEDTUNE_CACHE") from None
    return folder
