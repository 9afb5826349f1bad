"""Standard output and error, which may be anything: what is computed does not depend on who reads what is printed."""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any


class Screen(io.TextIOWrapper):
    """A stream that replaces characters it cannot write, and goes quiet once its reader is gone.

    A pipe is closed by `| head`, a terminal vanishes with its connection, a disk fills up behind `> log`.
    """

    stock: Any = None  # Python's own stream, which would close the file if it were dropped

    def write(self, text: str) -> int:
        """Writes, if anybody reads it."""
        try:
            return super().write(text)
        except OSError:
            self.silence()
            return len(text)

    def flush(self) -> None:
        """Flushes, if anybody reads it."""
        try:
            super().flush()
        except OSError:
            self.silence()

    def silence(self) -> None:
        """Sends what is still to come nowhere (https://docs.python.org/3/library/signal.html#note-on-sigpipe)."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def protect_streams() -> None:
    """Puts a `Screen` in the place of standard output and error, unless something else than Python's own is there."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # closed before Python started
            stream = Path(os.devnull).open("w")  # noqa: SIM115
        elif type(stream) is not io.TextIOWrapper or stream is not getattr(sys, f"__{name}__"):
            continue
        settings = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        with contextlib.suppress(OSError):
            stream.flush()
        same = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115 (it has no path)
        screen = Screen(same, encoding=stream.encoding, errors="replace", **settings)
        screen.stock = stream
        setattr(sys, name, screen)
        setattr(sys, f"__{name}__", screen)
