"""The view of a sweep: what it shows, that it fits the terminal, and that log lines survive beside it."""

import io
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import SimpleNamespace

import pytest
from rich.console import Console

from medtune.runtime import progress
from medtune.runtime.progress import Progress, reporting_to, track_work

NAMES = ["lora.r=8", "lora.r=16", "lora.r=32", "lora.r=64"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the view reads off its clock, to be moved by the test."""
    now = [1000.0]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def terminal(width: int = 100, height: int = 24) -> Console:
    return Console(force_terminal=True, color_system=None, width=width, height=height, file=Terminal())


def lines(view: Progress) -> list[str]:
    """What stands on the screen."""
    with view.console.capture() as capture:
        view.console.print(view)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_table() -> None:
    view = Progress(NAMES, terminal())
    view.update("lora.r=8", status="done", step=120, steps=120, loss=2.0, eval_loss=2.25)
    view.update("lora.r=16", status="running", step=40, steps=120, loss=2.31, eval_loss=2.5, tokens_per_second=620.4)
    view.update("lora.r=16", seconds_left=720.0)
    view.update("lora.r=32", status="failed", step=3, steps=120, loss=math.nan, eval_loss=math.nan)
    assert lines(view) == [
        "1 of 4 members done, 1 failed, 1 waiting, 1 running",
        "━━━━━━━━━───────────  45%  620 tokens/s",
        "member         step    loss eval_loss tokens/s    left",
        "lora.r=16    40/120  2.3100   2.5000       620  12 min",
        "lora.r=8    120/120  2.0000   2.2500*             done",
        "lora.r=32     3/120     nan      nan            failed",
    ]


def test_a_hundred_members_fit_and_all_that_run_are_seen() -> None:
    names = [f"trial={i}" for i in range(100)]
    view = Progress(names, terminal(height=24))
    for i, name in enumerate(names[:90]):
        view.update(name, status="done", step=9, steps=9, eval_loss=3 - i / 100)
    for name in names[90:]:
        view.update(name, status="running", steps=9)
    shown = lines(view)
    assert len(shown) <= 24
    assert [line.split()[0] for line in shown[3:13]] == names[90:]
    assert [line.split()[0] for line in shown[13:15]] == ["trial=89", "trial=88"]
    assert "2.1100*" in shown[13]
    for name in names[:90]:
        view.update(name, status="running")
    assert len(lines(view)) == 24


def test_a_name_is_shown_as_it_is() -> None:
    view = Progress(["lora.target_modules=[q_proj],[bold]x[/]"], terminal())
    view.update("lora.target_modules=[q_proj],[bold]x[/]", status="running")
    assert lines(view)[3].startswith("lora.target_modules=[q_proj],[bold]x[/] ")


@pytest.mark.parametrize("width", [20, 60])
def test_a_narrow_terminal_cuts_names_in_the_middle(width: int) -> None:
    name = "lora.r=16,trainer.learning_rate=0.0005"
    view = Progress([name], terminal(width))
    view.update(name, status="running", step=1, steps=120, loss=2.3, seconds_left=36000.0)
    shown = lines(view)
    assert len(shown) == 4
    assert max(map(len, shown)) <= width
    if width == 60:
        assert shown[3] == "lora.r=…=0.0005     1/120  2.3000        -         -  10.0 h"


def test_the_time_left_counts_members_that_wait(clock: list[float]) -> None:
    view = Progress(NAMES, terminal())
    assert view.estimate_remaining() == (0, "")
    for name in NAMES[:2]:  # one was resumed at step 100: its steps of the day before say nothing of the rate
        view.update(name, status="running", steps=120)
    view.update("lora.r=8", step=100)
    view.update("lora.r=16", step=1)
    clock[0] += 100
    view.update("lora.r=8", step=110)
    view.update("lora.r=16", step=11)
    # 20 steps in 100 s; 10 + 109 of the running, twice 120 of the waiting ones
    assert view.estimate_remaining() == (121 / 480, f"{359 * 5 / 60:.0f} min left")
    view.update("lora.r=16", seconds_left=7200.0)
    assert view.estimate_remaining()[1] == "2.0 h left"
    for name in NAMES:
        view.update(name, status="done", step=120, steps=120)
    assert view.estimate_remaining() == (1, "")


def test_without_a_terminal_one_line_a_minute(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    drawn = io.StringIO()
    with caplog.at_level(logging.INFO), Progress(NAMES, Console(file=drawn, force_terminal=False)) as view:
        view.update("lora.r=8", status="done", step=120, steps=120)
        for step in range(1, 122):
            clock[0] += 1
            view.update("lora.r=16", status="running", step=step, steps=240, loss=2.314)
    assert drawn.getvalue() == ""
    assert caplog.messages == [
        "1 of 4 members done, 2 waiting, 1 running: lora.r=16 step 60/240 loss 2.31; 9 min left",
        "1 of 4 members done, 2 waiting, 1 running: lora.r=16 step 120/240 loss 2.31; 8 min left",
    ]


def test_the_plain_line_is_said_by_no_member(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    speaker: ContextVar[str] = ContextVar("speaker", default="the sweep")
    said_by: list[str] = []
    monkeypatch.setattr(progress.log, "info", lambda *words: said_by.append(speaker.get()))
    view = Progress(NAMES, Console(file=io.StringIO(), force_terminal=False))
    speaker.set("lora.r=8")
    clock[0] += 60
    view.update("lora.r=8", status="running", steps=120)
    assert said_by == ["the sweep"]


def test_log_lines_stay_whole_above_the_table() -> None:
    console = terminal(width=60)
    handler = logging.StreamHandler(console.file)
    logger = logging.getLogger("medtune.test_progress")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    line = "[q_proj] a line that is longer than the terminal is wide " * 3
    try:
        with pytest.raises(KeyboardInterrupt), Progress(NAMES, console) as view:
            view.update("lora.r=8", status="running", step=1, steps=120)
            assert handler.stream is not console.file
            logger.info(line)
            raise KeyboardInterrupt
    finally:
        logger.removeHandler(handler)
    assert handler.stream is console.file
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{line}\n0 of 4 members done, 3 waiting, 1 running\n" in written
    assert "lora.r=8      1/120" in written


def test_steps_of_all_threads_are_counted() -> None:
    view = Progress(NAMES, terminal())

    def train(name: str) -> None:
        for step in range(1, 1001):
            view.update(name, status="running", step=step, steps=1000)

    with ThreadPoolExecutor(len(NAMES)) as pool:
        list(pool.map(train, NAMES))
    assert view.taken == 999 * len(NAMES)


def test_a_mistyped_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="eval_los"):
        Progress(NAMES, terminal()).update("lora.r=8", eval_los=1.0)


def test_work_reports_its_rate_and_what_is_left(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    reported: list[dict[str, object]] = []
    follow = reporting_to(lambda **values: reported.append(values))
    work = track_work("evaluating the adapter", "answers", 193)
    with caplog.at_level(logging.INFO), follow, work as advance:
        for _ in range(4):
            clock[0] += 10
            advance(24)
    assert caplog.messages == [
        "evaluating the adapter: 48 of 193 answers, 2.4/s, 1:00 left",
        "evaluating the adapter: 96 of 193 answers, 2.4/s, 0:40 left",
    ]
    assert reported[1] == {"work": "answers 48/193", "seconds_left": pytest.approx(145 / 2.4)}
    assert reported[-1] == {"work": "", "seconds_left": None}, "its end is reported"


def test_short_work_says_nothing(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    with caplog.at_level(logging.INFO), track_work("evaluating", "conversations", 2) as advance:
        clock[0] += 5
        advance(2)
    assert caplog.messages == []


def test_work_is_in_the_row_of_its_member_and_in_the_plain_line(
    caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    view = Progress(["medtune"], terminal(80))
    view.update("medtune", status="running", step=16, steps=16, loss=3.6, eval_loss=3.7, tokens_per_second=620.0)
    follow = reporting_to(lambda **values: view.update("medtune", **values))
    with follow, track_work("evaluating", "answers", 193) as advance:
        clock[0] += 60
        advance(96)
        shown = lines(view)
        assert view.plain_line() == "0 of 1 members done, 1 running: medtune answers 96/193; 1 min left"
    assert shown[1].endswith("1 min left")
    assert shown[3] == "medtune     16/16  3.6000   3.7000* answers 96/193   1 min"
    assert max(map(len, shown)) <= 80
    assert lines(view)[3] == "medtune     16/16  3.6000   3.7000*      620       -"
