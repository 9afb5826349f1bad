"""Ctrl-C and a scheduler's SIGTERM: both stop a run at the next place where everything can be saved.

In training this is between two micro-batches, in an evaluation between two batches: seconds away.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_deferring = 0  # runs of this process that save before they stop
_requested = False  # whether a stop was requested
_requested_at = 0.0  # by the monotonic clock, in seconds

MOMENT = 2.0  # seconds in which further signals count as the first


class Interrupted(KeyboardInterrupt):
    """A stop at a place where everything can be saved."""


def handle(signum: int, frame: FrameType | None) -> None:
    """Handles a signal: requests a stop from runs that save before they stop; otherwise raises KeyboardInterrupt.

    A second signal raises it too. One within MOMENT of the first is ignored: a scheduler signals a process and then its
    whole group.
    """
    global _requested_at
    if _requested and time.monotonic() - _requested_at < MOMENT:
        return
    if not _deferring or _requested:
        raise KeyboardInterrupt
    _requested_at = time.monotonic()
    request_stop(signum, frame)
    # Logging is not safe here: the signal may have come while its locks are held.
    with contextlib.suppress(OSError):  # the same signal may have ended its reader
        os.write(2, b"medtune: stopping: saving first; once more stops at once\n")


def request_stop(signum: int, frame: FrameType | None) -> None:
    """Handles a signal in a worker: requests a stop. Only the parent process stops at once."""
    global _requested
    _requested = True


def stop_requested() -> bool:
    """Returns whether the user or the system wants this process to stop."""
    return _requested


def raise_if_requested() -> None:
    """Raises `Interrupted` if a stop was requested. Called where a run can be saved."""
    if _requested:
        raise Interrupted


@contextmanager
def deferred() -> Iterator[None]:
    """Makes an interruption wait for `raise_if_requested` while the context lasts."""
    global _deferring, _requested
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
        if not _deferring:
            _requested = False


def install_handlers() -> None:
    """Installs `handle` for SIGTERM and Ctrl-C. A shell's background job ignores Ctrl-C and keeps ignoring it."""
    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handle)
