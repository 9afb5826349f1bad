"""Ctrl-C and a scheduler's SIGTERM -> a stop at the next place where everything can be saved.

In training that is between two micro-batches, or between two batches of an evaluation: seconds away.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_deferring = 0  # how many runs of this process want to be asked, not thrown out
_requested = False


class Interrupted(KeyboardInterrupt):
    """Raised where nothing is half done."""


def handle(signum: int, frame: FrameType | None) -> None:
    """Signal handler: raise KeyboardInterrupt; while runs can save, only ask them to stop, the first time."""
    asked = _requested
    request(signum, frame)
    if not asked:
        # Not through logging: this may have come in the middle of it, with its locks held.
        os.write(2, b"medtune: stopping: saving first; once more stops at once\n")


def request(signum: int, frame: FrameType | None) -> None:
    """The same in silence, for a process whose parent says it."""
    global _requested
    if not _deferring or _requested:
        raise KeyboardInterrupt
    _requested = True


def requested() -> bool:
    """Whether the user or the system wants this process to stop."""
    return _requested


def check() -> None:
    """Called where a run can stop and be saved. Raises `Interrupted` when it should."""
    if _requested:
        raise Interrupted


@contextmanager
def deferred() -> Iterator[None]:
    """While it lasts, an interruption waits for `check()`."""
    global _deferring, _requested
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
        if not _deferring:
            _requested = False


def listen() -> None:
    """Let SIGTERM and Ctrl-C end in `handle`; both, because a shell's background job ignores Ctrl-C."""
    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handle)
