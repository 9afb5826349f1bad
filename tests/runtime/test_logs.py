"""The screen shows what is addressed to the user, in lines that break between words; the log file has the rest."""

import logging
from pathlib import Path

import pytest

from medtune.runtime import logs
from medtune.runtime.logs import FILE_ONLY, ConsoleFilter, ScreenFormatter, log_member


def record(name: str, level: int, text: str = "text", **extra: object) -> logging.LogRecord:
    made = logging.LogRecord(name, level, __file__, 1, text, (), None)
    made.__dict__.update(extra)
    return made


@pytest.mark.parametrize(
    ("name", "level", "shown"),
    [
        ("medtune.training.pipeline", logging.INFO, True),
        ("__main__", logging.INFO, True),
        ("hydra.core", logging.WARNING, True),
        ("datasets", logging.INFO, False),  # "JAX version ... available", at import
        ("bitsandbytes.cextension", logging.WARNING, False),
        ("py.warnings", logging.WARNING, False),
        ("medtune_of_others", logging.WARNING, False),
        ("datasets", logging.ERROR, True),
    ],
)
def test_the_screen_shows_ours_and_errors(name: str, level: int, shown: bool) -> None:
    assert ConsoleFilter().filter(record(name, level)) is shown


def test_what_is_for_the_file_is_not_on_the_screen() -> None:
    assert not ConsoleFilter().filter(record("medtune.train", logging.ERROR, **FILE_ONLY))


def test_the_file_of_a_member_has_what_the_screen_does_not_show(tmp_path: Path) -> None:
    library = logging.getLogger("bitsandbytes.test_logs")
    with log_member("lora.r=8", tmp_path):
        library.warning("a kernel is missing")
    library.warning("after it ended")
    (line,) = (tmp_path / "train.log").read_text().splitlines()
    assert line.endswith("[bitsandbytes.test_logs][WARNING] a kernel is missing")


def test_lines_name_the_member_that_a_worker_sent_or_the_thread_is_in(tmp_path: Path) -> None:
    ours, sent = record("medtune.a", logging.INFO), record("medtune.a", logging.INFO, speaker="lora.r=4: ")
    with log_member("lora.r=8", tmp_path):
        assert ConsoleFilter().filter(ours) and ConsoleFilter().filter(sent)
    assert (ours.__dict__["speaker"], sent.__dict__["speaker"]) == ("lora.r=8: ", "lora.r=4: ")


TEXT = "12:00:00 INFO data: 288 rows of consultations (consultations.jsonl), read as messages  (group: group)"


@pytest.mark.parametrize("width", [40, 80])
def test_lines_break_between_words(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(logs, "terminal_width", lambda: width)
    written = ScreenFormatter("%(message)s").format(record("medtune.a", logging.INFO, TEXT)).splitlines()
    assert len(written) > 1 and max(map(len, written)) <= width
    assert all(line.startswith(logs.CONTINUATION) for line in written[1:])
    assert " ".join(written).split() == TEXT.split(), "no word is cut, none is lost"


def test_a_path_stays_whole_and_so_does_everything_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/results/" + "a-long-folder-name/" * 9
    monkeypatch.setattr(logs, "terminal_width", lambda: 80)
    line = record("medtune.a", logging.INFO, f"written: {path} at last")
    assert path in ScreenFormatter("%(message)s").format(line)
    monkeypatch.setattr(logs, "terminal_width", lambda: None)
    assert ScreenFormatter("%(message)s").format(line) == f"written: {path} at last"
