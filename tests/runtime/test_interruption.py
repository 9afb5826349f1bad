"""The first signal lets a run save, another one ends it, and signals sent together count as one."""

import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from medtune.runtime import interruption
from medtune.runtime.interruption import Interrupted, deferred, handle, raise_if_requested, stop_requested


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The seconds that the handler reads off its clock."""
    now = [1000.0]
    monkeypatch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: now[0]))
    yield now
    assert not stop_requested(), "what one run was asked is not asked of the next"


def test_without_a_run_that_saves_a_signal_ends_the_process() -> None:
    with pytest.raises(KeyboardInterrupt):
        handle(signal.SIGTERM, None)


def test_a_run_is_asked_once_and_ended_the_second_time(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with deferred():
        raise_if_requested()
        handle(signal.SIGINT, None)
        assert stop_requested()
        assert capfd.readouterr().err == "medtune: stopping: saving first; once more stops at once\n"
        with pytest.raises(Interrupted):
            raise_if_requested()
        clock[0] += interruption.MOMENT
        with pytest.raises(KeyboardInterrupt) as second:
            handle(signal.SIGINT, None)
        assert not isinstance(second.value, Interrupted)


def test_signals_within_a_moment_are_one(clock: list[float]) -> None:
    with deferred():
        handle(signal.SIGTERM, None)
        clock[0] += interruption.MOMENT - 0.1
        handle(signal.SIGTERM, None)


def test_the_request_lasts_until_the_last_run_has_ended() -> None:
    with deferred():
        with deferred():
            handle(signal.SIGTERM, None)
        assert stop_requested()
