"""Ctrl-C and a scheduler's SIGTERM -> a stop at the next place where everything can be saved.

In training that is between two micro-batches, or between two batches of an evaluation: seconds away.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_deferring = 0  # how many runs of this process want to be asked, not thrown out
_requested = False
_asked = 0.0  # when

MOMENT = 2.0  # seconds


class Interrupted(KeyboardInterrupt):
    """Raised where nothing is half done."""


def handle(signum: int, frame: FrameType | None) -> None:
    """Signal handler: raise KeyboardInterrupt; while runs can save, only ask them to stop, the first time.

    What comes within a moment of the first is the same wish: a scheduler signals a process and its whole group.
    """
    global _asked
    if _requested and time.monotonic() - _asked < MOMENT:
        return
    if not _deferring or _requested:
        raise KeyboardInterrupt
    _asked = time.monotonic()
    request_stop(signum, frame)
    # Not through logging: this may have come in the middle of it, with its locks held.
    os.write(2, b"medtune: stopping: saving first; once more stops at once\n")


def request_stop(signum: int, frame: FrameType | None) -> None:
    """Signal handler of a worker: ask to stop, and leave it to the parent to stop at once."""
    global _requested
    _requested = True


def stop_requested() -> bool:
    """Whether the user or the system wants this process to stop."""
    return _requested


def raise_if_requested() -> None:
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


def install_handlers() -> None:
    """Let SIGTERM and Ctrl-C end in `handle`; both, because a shell's background job ignores Ctrl-C."""
    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handle)
