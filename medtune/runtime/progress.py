"""Where every member of a sweep stands -> one live table on a terminal, one plain line a minute elsewhere."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from contextvars import Context
from dataclasses import dataclass, replace
from math import inf, isnan
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.text import Text

log = logging.getLogger(__name__)
PLAIN_INTERVAL, MAX_NAMED = 60.0, 4  # seconds between two plain lines, and running members that each names
HEADER_LINES, LOG_LINES = 3, 5  # lines above the members' rows, and lines that finished members leave to the log


@dataclass(frozen=True)
class MemberProgress:
    """Where a member is: at `step` of `steps` (0 while unknown), with its latest numbers (None before the first)."""

    status: str = "waiting"  # waiting, running, done, failed, interrupted, refused, pruned, paused
    step: int = 0
    steps: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None


def show_bars() -> bool:
    """Whether there is a terminal for bars, and no table on it that they would tear apart."""
    return sys.stderr.isatty() and not Progress.drawn


class Progress(ExitStack):
    """One table that follows all members while they train. Use as a context manager."""

    drawn = False

    def __init__(self, names: Sequence[str], console: Console | None = None) -> None:
        super().__init__()
        out = sys.stdout.isatty()  # else standard error, but not beside `| tee`, which would write into the table
        drawn = out or (sys.stderr.isatty() and not Path("/dev/stdout").is_fifo())
        self.console = console or Console(stderr=not out, force_terminal=drawn)
        self.console.soft_wrap = True  # the terminal folds a long log line; rich would cut it in two
        self.standings = {name: MemberProgress() for name in names}
        self.began, self.taken = 0.0, 0  # when the first step was reported, and steps taken since
        self.lock, self.said = Lock(), time.monotonic()

    def __enter__(self) -> "Progress":
        if self.console.is_interactive:
            for handler in [h for n in (None, *logging.root.manager.loggerDict) for h in logging.getLogger(n).handlers]:
                if isinstance(handler, logging.StreamHandler) and handler.stream and handler.stream.isatty():
                    self.callback(handler.setStream, handler.stream)  # it holds the sys.stdout that Live replaces
                    handler.setStream(FileProxy(self.console, handler.stream))
            Progress.drawn = True
            self.callback(setattr, Progress, "drawn", False)
            out, err = sys.stdout.isatty(), sys.stderr.isatty()  # what goes to a file goes there still
            self.enter_context(Live(self, console=self.console, redirect_stdout=out, redirect_stderr=err))
        return self

    def update(self, name: str, **values: Any) -> None:
        """Change fields of a member's `Standing`, from any thread. Draws nothing: call it at every step."""
        now = time.monotonic()
        with self.lock:
            before = self.standings[name]
            after = self.standings[name] = replace(before, **values)
            if after.status == "running" and after.step > before.step:
                self.began = self.began or now
                self.taken += after.step - before.step if before.step else 0  # a resumed member's first is a leap
            if due := not self.console.is_interactive and now - self.said >= PLAIN_INTERVAL:
                self.said = now
        if due:
            running = [(n, s) for n, s in self.standings.items() if s.status == "running"]
            words = [f"{n} step {s.step}/{s.steps} loss {format_number(s.loss, '.2f')}" for n, s in running[:MAX_NAMED]]
            line = [self.counts() + (": " if words else "") + ", ".join(words), self.estimate_remaining()[1]]
            Context().run(log.info, "%s", "; ".join(filter(None, line)))  # said by the sweep, not by the member

    def counts(self) -> str:
        """How many members have which status; the running ones last, for their names to follow."""
        found = Counter(s.status for s in self.standings.values())
        others = [f"{found[status]} {status}" for status in sorted(found, key="running".__eq__) if status != "done"]
        return ", ".join([f"{found['done']} of {len(self.standings)} members done", *others])

    def estimate_remaining(self) -> tuple[float, str]:
        """The share of all steps that is taken, and the time left: at the rate so far, or as a member says."""
        members = self.standings.values()
        ahead = [s for s in members if s.status in ("waiting", "running")]
        known = [s.step if s.status in ("done", "pruned") else s.steps for s in members if s.steps]
        left = sum(max((s.steps or sum(known) / max(len(known), 1)) - s.step, 0) for s in ahead)
        taken, pace = sum(s.step for s in members), (time.monotonic() - self.began) / max(self.taken, 1)
        seconds = max([left * pace, *(s.seconds_left or 0.0 for s in ahead)])
        return taken / max(taken + left, 1), f"{format_duration(seconds)} left" if self.taken and left else ""

    def __rich__(self) -> Group:
        """The sweep, a row for each member that runs, and as many as there is room for of the best that ended."""
        share, left = self.estimate_remaining()
        rank = {n: inf if s.eval_loss is None or isnan(s.eval_loss) else s.eval_loss for n, s in self.standings.items()}
        started = [(name, s) for name, s in self.standings.items() if s.status != "waiting"]
        started.sort(key=lambda member: -inf if member[1].status == "running" else rank[member[0]])
        rates = [s.tokens_per_second or 0.0 for _, s in started if s.status == "running"]
        room = self.console.height - HEADER_LINES
        width = min(max([6, *map(len, self.standings)]), max(self.console.width - 45, 6))
        lines = [self.counts(), f"{'━' * round(20 * share):─<20} {share:4.0%}  {sum(rates):,.0f} tokens/s  {left}"]
        lines.append(f"{'member':<{width}} {'step':>9} {'loss':>7} eval_loss tokens/s    left")
        for name, s in started[: max(min(len(rates), room), room - LOG_LINES, 0)]:
            short = name if len(name) <= width else f"{name[: width // 2]}…{name[len(name) - (width - 1) // 2 :]}"
            mark = "*" if rank[name] == min(rank.values()) < inf else " "
            row = f"{short:<{width}} {f'{s.step}/{s.steps}':>9} {format_number(s.loss):>7} "
            row += f"{format_number(s.eval_loss):>8}{mark} "
            rate = f"{format_number(s.tokens_per_second, ',.0f'):>8} {format_duration(s.seconds_left):>7}"
            lines.append(row + (rate if s.status == "running" else f"{s.status:>16}"))
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


def format_number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def format_duration(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
