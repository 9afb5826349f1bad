"""Sweeps that are hurt: a member that raises, one that diverges, kills at any moment. The others end as if alone."""

import json
import os
import random
import signal
import time
from pathlib import Path
from subprocess import TimeoutExpired

import pytest
import torch
from safetensors.torch import load_file

from processes import Command

GOOD = ("good", "better", "best")
WAYS = {"one after another": (1, 1), "together": (4, 1), "on two cores": (1, 2)}  # width, processes


def start(sweep: Path, way: str, overrides: list[str]) -> Command:
    width, processes = WAYS[way]
    words = [str(sweep), str(width), str(processes), *overrides]
    # One thread for each in every way: equal rounding.
    return Command(Path(__file__).with_name("faulty_sweep.py"), *words, OMP_NUM_THREADS=str(processes))


def until_training(process: Command) -> None:
    """Wait until the first member has its adapter; what comes before takes longest, and computes nothing."""
    assert any("adapter:" in line for line in iter(process.stdout.readline, ""))


def finish(sweep: Path, way: str, overrides: list[str]) -> float:
    """Run a sweep to its end; returns the seconds that took from the first adapter on."""
    process = start(sweep, way, overrides)
    began = None
    if not (sweep / "sweep.json").exists():
        until_training(process)
        began = time.monotonic()
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return time.monotonic() - began if began else 0.0


def kill(sweep: Path, way: str, overrides: list[str], after: float) -> None:
    """Start a sweep and kill it without warning so many seconds after its first adapter; its workers go with it."""
    process = start(sweep, way, overrides)
    until_training(process)
    try:
        process.wait(after)
    except TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()


def statuses(sweep: Path) -> dict[str, str]:
    rows = json.loads((sweep / "sweep.json").read_text())["members"]
    return {row["folder"]: row["status"] for row in rows}


def history(run: Path) -> list[dict[str, float]]:
    """What was logged, without what is measured by the clock."""
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "peak_memory_gb", "eval_seconds")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.fixture(scope="module")
def words(tiny_overrides: list[str]) -> list[str]:
    """Nine steps, evaluated every third."""
    own = ["trainer.max_steps=9", "trainer.gradient_accumulation_steps=1", "eval.every=3", "quantization=none"]
    return [*tiny_overrides, *own]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The sweep that nobody killed, one member after another, and how long it took."""
    sweep = tmp_path_factory.mktemp("whole")
    return sweep, finish(sweep, "one after another", words)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_a_sweep_killed_twice_ends_as_if_it_had_not_been(
    whole: tuple[Path, float], words: list[str], tmp_path: Path, way: str
) -> None:
    uninterrupted, seconds = whole
    seed = int.from_bytes(os.urandom(4))
    moments = random.Random(seed)
    for _ in range(2):
        after = moments.uniform(0.0, 0.6) * seconds
        kill(tmp_path, way, words, after)
        print(f"seed {seed}: {way}, killed after {after:.1f} of {seconds:.1f} s")
    finish(tmp_path, way, words)
    expected = {"good": "done", "better": "done", "best": "done", "raises": "failed", "diverges": "failed"}
    assert statuses(tmp_path) == statuses(uninterrupted) == expected
    for name in GOOD:
        ours, theirs = (
            load_file(sweep / name / "adapter" / "adapter_model.safetensors") for sweep in (tmp_path, uninterrupted)
        )
        distance = max(((ours[key] - theirs[key]).norm() / theirs[key].norm()).item() for key in theirs)
        print(f"  {name}: adapters differ by {distance:.1e}")
        if WAYS[way][0] == 1:
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
            assert history(tmp_path / name) == history(uninterrupted / name)
        else:
            assert distance < 1e-4
    for name, error in (("raises", "lr_end"), ("diverges", "Diverged")):
        log = (tmp_path / name / "train.log").read_text()
        assert "Traceback" in log and error in log
        assert not (tmp_path / name / "adapter").exists()
