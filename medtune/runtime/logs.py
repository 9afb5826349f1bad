"""Several runs in one process: which member a log line is from, which file it goes to, and what the screen shows."""

import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

FILE_ONLY = {"file_only": True}
OURS = ("medtune", "hydra", "hydra_plugins", "__main__")  # packages whose log lines are for the user
CONTINUATION = " " * 9  # the width of the time, under which the further lines of a message are indented

_speaker: ContextVar[str] = ContextVar("speaker", default="")


class ConsoleFilter(logging.Filter):
    """Keeps from the screen what is for the log file only.

    That is what is marked so, as tracebacks are, and what other libraries say below the level of an error.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        add_member_name(record)
        package = record.name.partition(".")[0]
        addressed_to_user = package in OURS or record.levelno >= logging.ERROR
        return addressed_to_user and not getattr(record, "file_only", False)


class ScreenFormatter(logging.Formatter):
    """Breaks log lines between words where the terminal ends; without a terminal they stay whole."""

    def format(self, record: logging.LogRecord) -> str:
        text, width = super().format(record), terminal_width()
        if width is None:
            return text
        lines: list[str] = []
        for line in text.splitlines():
            wrapped = textwrap.wrap(
                line, width, subsequent_indent=CONTINUATION, break_long_words=False, break_on_hyphens=False
            )
            lines += wrapped or [""]
        return "\n".join(lines)


def terminal_width() -> int | None:
    """Returns the columns of the terminal that standard output goes to, or None if it goes elsewhere."""
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or None  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return None


def add_member_name(record: logging.LogRecord) -> bool:
    """Writes into a record which member it is from: a logging filter."""
    if not hasattr(record, "speaker"):  # a worker's record comes with its name
        name = _speaker.get()
        record.speaker = f"{name}: " if name else ""
    return True


@contextmanager
def log_member(name: str, folder: Path) -> Iterator[None]:
    """Marks what this thread logs as said by member `name`, and writes it to `train.log` in `folder` too."""
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
    """Silences warnings and progress bars that third-party libraries address to developers.

    What they log all the same goes to the log file; `ConsoleFilter` keeps it from the screen.
    """
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.captureWarnings(True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it has a handler of its own
    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score logs a line for each scorer
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
