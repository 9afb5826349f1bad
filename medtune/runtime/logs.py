"""Several runs in one process: who is speaking, and which log it goes to."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

FILE_ONLY = {"file_only": True}

_speaker: ContextVar[str] = ContextVar("speaker", default="")


def add_member_name(record: logging.LogRecord) -> bool:
    """A logging filter that writes into a record which member speaks."""
    if not hasattr(record, "speaker"):  # a worker's record comes with its name
        name = _speaker.get()
        record.speaker = f"{name}: " if name else ""
    return True


class ConsoleFilter(logging.Filter):
    """Keeps from the screen what is for the log only: tracebacks, and what the command line says in its own words."""

    def filter(self, record: logging.LogRecord) -> bool:
        return add_member_name(record) and not getattr(record, "file_only", False)


@contextmanager
def log_member(name: str, folder: Path) -> Iterator[None]:
    """While it lasts, what this thread logs is said by member `name` and goes to `train.log` in its folder too."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
    handler.addFilter(lambda record: _speaker.get() == name)
    token = _speaker.set(name)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        _speaker.reset(token)


def silence_libraries() -> None:
    """Leave the screen to what the user needs to know; train.log has the rest."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Deprecations speak to programmers; bitsandbytes looks on a CPU for a kernel that it does not need.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.captureWarnings(True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score's
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
