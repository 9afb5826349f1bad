"""`python -m medtune` lists the commands, and every one has a console script."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from medtune import __main__ as listing

ROOT = Path(__file__).parents[2]


def listed(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["medtune", *words])
    listing.main()


def test_commands_are_listed_with_a_phrase_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed(monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    for name, phrase in listing.COMMANDS.items():
        assert any(line.split() == ["python", "-m", f"medtune.{name}", *phrase.split()] for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trian", "medtune: trian: did you mean python -m medtune.train?"),
        ("train", "medtune: type python -m medtune.train (or medtune-train)"),
        ("fly", "medtune: fly: no such command; there is train, evaluate, prepare"),
    ],
)
def test_a_word_is_answered_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str, answer: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        listed(monkeypatch, word)
    assert ended.value.code == 2 and capsys.readouterr().err.splitlines() == [answer]


def test_every_command_has_a_module_and_a_console_script() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert set(scripts) == {"medtune", *(f"medtune-{name}" for name in listing.COMMANDS)}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
