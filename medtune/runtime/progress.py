"""How far each member of a sweep is -> one live table on a terminal, plain lines at intervals elsewhere.

`Progress` follows members; `track_work` follows one piece of work inside a member, such as answering a test set.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass, replace
from math import inf, isnan
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console, Group, JustifyMethod
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)
PLAIN_INTERVAL, MAX_NAMED = 60.0, 4  # seconds between two plain lines; running members that a plain line names
WORK_INTERVAL = 15.0  # seconds between two plain lines about one piece of work
HEADER_LINES, LOG_LINES = 3, 5  # lines above the members' rows; lines that finished members leave to the log
COLUMNS = (("step", 9), ("loss", 7), ("eval_loss", 9), ("tokens/s", 8), ("left", 7))  # and their least widths
NUMBER_COLUMNS = sum(1 + width for _, width in COLUMNS)  # characters
SHORTEST_NAME = 6  # characters

OnProgress = Callable[..., None]  # takes fields of MemberProgress by name


def ignore_progress(**values: Any) -> None:
    """Drops what is reported, where nobody follows."""


@dataclass(frozen=True)
class MemberProgress:
    """How far a member is: at `step` of `steps` (0 while unknown), with its latest numbers (None before the first)."""

    status: str = "waiting"  # waiting, running, done, failed, interrupted, refused, pruned, paused
    step: int = 0
    steps: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    work: str = ""  # what it does instead of training steps, as "answers 96/193"


class Progress(ExitStack):
    """One table that follows all members while they train. Use as a context manager."""

    drawn = False  # whether a table is on the screen of this process

    def __init__(self, names: Sequence[str], console: Console | None = None) -> None:
        super().__init__()
        out = sys.stdout.isatty()  # else standard error, but not beside `| tee`, which would write into the table
        drawn = out or (sys.stderr.isatty() and not Path("/dev/stdout").is_fifo())
        self.console = console or Console(stderr=not out, force_terminal=drawn)
        self.console.soft_wrap = True  # the terminal folds a long log line; rich would cut it in two
        self.members = {name: MemberProgress() for name in names}
        self.began, self.taken = 0.0, 0  # when the first step was reported, and steps taken since
        self.lock, self.last_line = Lock(), time.monotonic()

    def __enter__(self) -> "Progress":
        if self.console.is_interactive:
            self.redirect_log_handlers()
            Progress.drawn = True
            self.callback(setattr, Progress, "drawn", False)
            out, err = sys.stdout.isatty(), sys.stderr.isatty()  # what goes to a file still goes there
            self.enter_context(Live(self, console=self.console, redirect_stdout=out, redirect_stderr=err))
        return self

    def redirect_log_handlers(self) -> None:
        """Lets log lines appear above the table: handlers hold the sys.stdout that Live replaces."""
        for name in (None, *logging.root.manager.loggerDict):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream and handler.stream.isatty():
                    self.callback(handler.setStream, handler.stream)
                    handler.setStream(FileProxy(self.console, handler.stream))

    def update(self, name: str, **values: Any) -> None:
        """Changes fields of a member's `MemberProgress`, from any thread. Draws nothing: call it at every step."""
        now = time.monotonic()
        with self.lock:
            before = self.members[name]
            after = self.members[name] = replace(before, **values)
            if after.status == "running" and after.step > before.step:
                self.began = self.began or now
                self.taken += after.step - before.step if before.step else 0  # a resumed member's first is a leap
            due = not self.console.is_interactive and now - self.last_line >= PLAIN_INTERVAL
            if due:
                self.last_line = now
        if due:
            Context().run(log.info, "%s", self.plain_line())  # logged for the sweep, not for the member

    def plain_line(self) -> str:
        """Returns the counts, the running members and the time left in one line."""
        running = [(name, member) for name, member in self.members.items() if member.status == "running"]
        positions = [f"{name} {describe_position(member)}" for name, member in running[:MAX_NAMED]]
        line = self.counts() + (": " if positions else "") + ", ".join(positions)
        return "; ".join(filter(None, [line, self.estimate_remaining()[1]]))

    def counts(self) -> str:
        """Returns how many members have which status; the running ones last, for their names to follow."""
        by_status = Counter(member.status for member in self.members.values())
        others = sorted((status for status in by_status if status != "done"), key="running".__eq__)
        parts = [f"{by_status['done']} of {len(self.members)} members done"]
        return ", ".join(parts + [f"{by_status[status]} {status}" for status in others])

    def estimate_remaining(self) -> tuple[float, str]:
        """Returns the share of all steps that is taken, and the time left.

        The time follows from the rate so far, unless a member itself reports a longer one.
        """
        members = self.members.values()
        ahead = [member for member in members if member.status in ("waiting", "running")]
        known = [m.step if m.status in ("done", "pruned") else m.steps for m in members if m.steps]
        typical = sum(known) / max(len(known), 1)
        left = sum(max((member.steps or typical) - member.step, 0) for member in ahead)
        taken, pace = sum(member.step for member in members), (time.monotonic() - self.began) / max(self.taken, 1)
        seconds = max([left * pace, *(member.seconds_left or 0.0 for member in ahead)])
        working = any(member.work and member.seconds_left for member in ahead)
        known_rate = working or (self.taken and left)
        return taken / max(taken + left, 1), f"{format_duration(seconds)} left" if known_rate else ""

    def __rich__(self) -> Group:
        """Returns the sweep in two lines, a row for each running member, and the best finished ones that there is room
        for.
        """
        share, left = self.estimate_remaining()
        rank = {name: rank_of(member) for name, member in self.members.items()}
        started = [(name, member) for name, member in self.members.items() if member.status != "waiting"]
        started.sort(key=lambda pair: -inf if pair[1].status == "running" else rank[pair[0]])
        running = [member for _, member in started if member.status == "running"]
        rate = sum(member.tokens_per_second or 0.0 for member in running)
        room = self.console.height - HEADER_LINES
        shown = started[: max(min(len(running), room), room - LOG_LINES, 0)]
        bar = f"{'━' * round(20 * share):─<20} {share:4.0%}  {rate:,.0f} tokens/s  {left}"
        head = [Text(line, no_wrap=True, overflow="ellipsis") for line in (self.counts(), bar)]
        best = min(rank.values())
        return Group(*head, self.table(shown, {name for name in rank if rank[name] == best < inf}))

    def table(self, shown: Sequence[tuple[str, MemberProgress]], best: set[str]) -> Table:
        """Returns a row for each member of `shown`, as many columns as fit; members of `best` are marked with a
        star.
        """
        longest = max([SHORTEST_NAME, *map(len, self.members)])
        width = min(longest, max(self.console.width - NUMBER_COLUMNS, SHORTEST_NAME))
        table = Table(box=None, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
        table.add_column("member", width=width, no_wrap=True)
        used = width
        for header, least in COLUMNS:
            used += 1 + least
            if used <= self.console.width:
                justify: JustifyMethod = "left" if header == "eval_loss" else "right"
                table.add_column(header, justify=justify, min_width=least, no_wrap=True)
        for name, member in shown:
            cells = [shorten(name, width), *numbers_of(member, name in best)]
            table.add_row(*(Text(cell) for cell in cells[: len(table.columns)]))
        return table


def numbers_of(member: MemberProgress, best: bool) -> list[str]:
    """Returns a member's cells in `COLUMNS`."""
    mark = "*" if best else " "
    rate, left = format_number(member.tokens_per_second, ",.0f"), format_duration(member.seconds_left)
    if member.status != "running":
        rate, left = "", member.status
    elif member.work:
        rate = member.work
    step, eval_loss = f"{member.step}/{member.steps}", f"{format_number(member.eval_loss):>8}{mark}"
    return [step, format_number(member.loss), eval_loss, rate, left]


def show_bars() -> bool:
    """Returns whether progress bars may be drawn: there is a terminal, and no live table on it that they would tear
    apart.
    """
    return sys.stderr.isatty() and not Progress.drawn


def rank_of(member: MemberProgress) -> float:
    """Returns the loss that a member is ranked by; infinite while it has none."""
    return inf if member.eval_loss is None or isnan(member.eval_loss) else member.eval_loss


def describe_position(member: MemberProgress) -> str:
    """Returns where a running member is, in words."""
    if member.work:
        return member.work
    return f"step {member.step}/{member.steps} loss {format_number(member.loss, '.2f')}"


def shorten(name: str, width: int) -> str:
    """Cuts a name in the middle, where members of a sweep differ least, to at most `width` characters."""
    if len(name) <= width:
        return name
    return f"{name[: width // 2]}…{name[len(name) - (width - 1) // 2 :]}"


def format_number(value: float | None, form: str = ".4f") -> str:
    """Returns a number in the given format; a dash for None."""
    return "-" if value is None else format(value, form)


def format_duration(seconds: float | None) -> str:
    """Returns seconds as minutes, or as hours from 100 minutes on; a dash for None."""
    if seconds is None:
        return "-"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


_on_progress: ContextVar[OnProgress] = ContextVar("on_progress", default=ignore_progress)


@contextmanager
def reporting_to(on_progress: OnProgress) -> Iterator[None]:
    """Sends the progress of all work inside this context to `on_progress`."""
    token = _on_progress.set(on_progress)
    try:
        yield
    finally:
        _on_progress.reset(token)


@contextmanager
def track_work(what: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """Follows one piece of work of `total` units; yields a function that takes how many more are done.

    The live table shows it in the row of the member. Without a terminal, a line every `WORK_INTERVAL` seconds says how
    far it is, at which rate, and how long it will take. Work that ends sooner says nothing.
    """
    on_progress, began = _on_progress.get(), time.monotonic()
    done, last_line = 0, began

    def advance(count: int) -> None:
        nonlocal done, last_line
        done += count
        now = time.monotonic()
        rate = done / max(now - began, 1e-9)
        seconds_left = (total - done) / rate
        on_progress(work=f"{unit} {done}/{total}", seconds_left=seconds_left)
        if now - last_line >= WORK_INTERVAL and not Progress.drawn:
            last_line = now
            clock = format_clock(seconds_left)
            log.info("%s: %s of %s %s, %s/s, %s left", what, done, total, unit, format_rate(rate), clock)

    try:
        yield advance
    finally:
        on_progress(work="", seconds_left=None)


def format_rate(rate: float) -> str:
    """Units a second, with two digits or more."""
    return f"{rate:.1f}" if rate < 100 else f"{rate:,.0f}"


def format_clock(seconds: float) -> str:
    """Returns seconds as minutes:seconds."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"
