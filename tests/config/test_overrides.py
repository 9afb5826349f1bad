"""Overrides are completed as they were typed when the sweep was begun."""

import json
from pathlib import Path

import pytest

from medtune.config.overrides import check_overrides, resume_sweep_overrides
from medtune.config.schema import RunConfig
from medtune.runtime.errors import UserError


def sweep_begun_with(folder: Path, *words: str) -> Path:
    (folder / "sweep.json").write_text(json.dumps({"command": words, "members": []}))
    return folder


@pytest.mark.parametrize("launcher", ["packed", "shared_base"])
def test_a_sweep_resumes_under_the_launchers_new_name(tmp_path: Path, launcher: str) -> None:
    sweep = sweep_begun_with(tmp_path, f"hydra/launcher={launcher}", "hydra.launcher.width=2", "lora.r=4,8")
    words = resume_sweep_overrides([f"sweep={sweep}"])
    assert words == [
        "hydra/launcher=shared_base", "hydra.launcher.width=2", "lora.r=4,8", f"hydra.sweep.dir='{sweep}'"
    ]  # fmt: skip
    assert not list(check_overrides(words, RunConfig))


def test_what_is_typed_now_wins_over_how_a_sweep_was_run(tmp_path: Path) -> None:
    sweep = sweep_begun_with(tmp_path, "hydra/launcher=packed", "lora.r=4,8")
    words = resume_sweep_overrides([f"sweep={sweep}", "hydra/launcher=basic"])
    assert words == ["lora.r=4,8", "hydra/launcher=basic", f"hydra.sweep.dir='{sweep}'"]


@pytest.mark.parametrize(("words", "line"), [(["sweep="], "names no folder"), (["sweep=nowhere"], "no sweep in it")])
def test_a_sweep_that_cannot_be_resumed_is_refused(words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        resume_sweep_overrides(words)
