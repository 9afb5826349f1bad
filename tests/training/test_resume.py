"""A run that was stopped goes on as if it had not been: from where, and what is refused."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medtune.config.schema import RunConfig
from medtune.evaluation import likelihood
from medtune.results import checkpoints
from medtune.runtime import interruption
from medtune.runtime.errors import RunFailed, RunPaused, UserError
from medtune.runtime.files import read_json, read_jsonl
from medtune.training.pipeline import Membership, train
from medtune.training.trainer import AdapterTrainer, StepGuard

Compose = Callable[..., RunConfig]
COMMON = ["lora.lora_dropout=0.1", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=8", "eval.every=2"]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_run(ours: Path, theirs: Path) -> bool:
    """Adapters to the bit, and every number and answer that was logged but those of the clock."""
    timed = ("tokens_per_second", "peak_memory_gb", "eval_seconds")
    logged = [
        [
            {name: value for name, value in row.items() if name not in timed}
            for file in ("history.jsonl", "samples.jsonl")
            for row in read_jsonl(run / file)
        ]
        for run in (ours, theirs)
    ]
    numbers = [read_json(run / "metrics.json") for run in (ours, theirs)]
    best = [{name: found[name] for name in ("base", "best", "final")} for found in numbers]
    weights = [adapter(run) for run in (ours, theirs)]
    equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    return equal and logged[0] == logged[1] and best[0] == best[1]


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ask for a stop when a place where a run can stop is passed for the n-th time; 0 never."""

    def arm(count: int) -> None:
        passed = iter(range(1, 10**9))

        def check() -> None:
            if next(passed) == count:
                raise interruption.Interrupted

        monkeypatch.setattr(interruption, "raise_if_requested", check)

    return arm


def test_an_interruption_anywhere_changes_nothing(
    tiny_run: Compose, tmp_path: Path, interrupt_at: Callable[[int], None]
) -> None:
    train(tiny_run(*COMMON), tmp_path / "whole")
    # Between micro-batches, in the losses and in the answers of an evaluation, at the first step and at the last one.
    steps = []
    for count in (1, *range(3, 64, 6)):
        run = tmp_path / str(count)
        interrupt_at(count)
        try:
            train(tiny_run(*COMMON), run)
            break
        except KeyboardInterrupt:
            saved = checkpoints.latest_complete(run / "checkpoints")
            steps.append(saved.step if saved else 0)
            assert read_json(run / "run.json")["status"] == "interrupted"
        interrupt_at(0)
        train(tiny_run(*COMMON), run)
        assert same_run(run, tmp_path / "whole"), f"stopped at place {count}, step {steps[-1]}"
        assert len(read_json(run / "run.json")["resumed"]) == 1
    assert {0, 8} < set(steps) and any(step % 2 for step in steps), steps


def test_the_checkpoint_of_an_interruption_is_of_the_last_step(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the last evaluation, which may be hours ago."""

    def check() -> None:
        raise interruption.Interrupted

    class Stops(StepGuard):
        def on_step_end(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, *more, **kwargs)
            if state.global_step == 5:
                monkeypatch.setattr(interruption, "raise_if_requested", check)

    monkeypatch.setattr("medtune.training.trainer.StepGuard", Stops)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(*COMMON, "eval.every=4"), tmp_path / "run")
    saved = checkpoints.latest_complete(tmp_path / "run" / "checkpoints")
    assert saved and saved.step == 5 and saved.evaluated and not saved.finished


def test_a_half_written_checkpoint_is_passed_over(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_run(*COMMON), tmp_path / "whole")
    run = tmp_path / "run"
    stock = checkpoints.write_manifest

    def killed(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-6":
            file = checkpoint / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[:100])
            raise KeyboardInterrupt  # not one that the run may save at: as if the process were gone
        stock(checkpoint)

    monkeypatch.setattr(checkpoints, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(*COMMON), run)
    monkeypatch.setattr(checkpoints, "write_manifest", stock)
    assert sorted(path.name for path in run.glob("checkpoints/*")) == ["checkpoint-4", "checkpoint-6"]
    train(tiny_run(*COMMON), run)
    assert same_run(run, tmp_path / "whole")


def test_a_full_disk_costs_the_run_and_says_so(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: stock(path)._replace(free=1_000_000))
    with pytest.raises(
        RunFailed, match=r"NoSpace: 1 MB are free in .*, and a checkpoint takes 20 MB: free some and run"
    ):
        train(tiny_run(*COMMON), tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", stock)
    train(tiny_run(*COMMON), tmp_path / "run")
    assert read_json(tmp_path / "run" / "run.json")["status"] == "done"


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_no_half_of_it(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = shutil.disk_usage
    full = []

    def save(self: AdapterTrainer, folder: str) -> None:
        full.append(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    free = lambda path: stock(path)._replace(free=1000) if full else stock(path)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", free)
    monkeypatch.setattr(AdapterTrainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(RunFailed, match="NoSpace: 0 MB are free"):
        train(tiny_run(*COMMON), tmp_path / "run")
    assert full and not list((tmp_path / "run" / "checkpoints").iterdir())


def test_another_configuration_is_refused_by_name(tiny_run: Compose, tmp_path: Path) -> None:
    with pytest.raises(RunPaused):
        train(tiny_run(*COMMON), tmp_path, Membership(pause_at=4))
    with pytest.raises(
        UserError, match=r"differs in lora\.r \(16, now 8\), lora\.lora_alpha \(32\.0, now 16\.0\): choose"
    ):
        train(tiny_run(*COMMON, "lora.r=8"), tmp_path)
    assert read_json(tmp_path / "run.json")["configuration"]["lora"]["r"] == 16
    train(tiny_run(*COMMON, "wandb.project=elsewhere"), tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        train(tiny_run(*COMMON), tmp_path)


def test_other_data_under_the_same_name_is_refused(tiny_run: Compose, data_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    shutil.copyfile(data_file, file)
    with pytest.raises(RunPaused):
        train(tiny_run(*COMMON, f"data.path={file}"), tmp_path / "run", Membership(pause_at=4))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-3]))
    for _ in range(2):  # asking again does not help
        with pytest.raises(UserError, match="was begun with other data than this: choose another folder"):
            train(tiny_run(*COMMON, f"data.path={file}"), tmp_path / "run")


def test_a_pause_at_every_evaluation_changes_nothing(tiny_run: Compose, tmp_path: Path) -> None:
    train(tiny_run(*COMMON), tmp_path / "whole")
    for step in (2, 4, 6):
        with pytest.raises(RunPaused):
            train(tiny_run(*COMMON), tmp_path / "run", Membership(pause_at=step))
        assert read_json(tmp_path / "run" / "run.json")["status"] == "paused"
    train(tiny_run(*COMMON), tmp_path / "run")
    assert same_run(tmp_path / "run", tmp_path / "whole")


def test_patience_outlives_an_interruption(tiny_run: Compose, tmp_path: Path) -> None:
    # At this rate every evaluation after the first is worse.
    words = [*COMMON, "trainer.learning_rate=0.6", "trainer.lr_scheduler_type=constant", "lora.lora_dropout=0"]
    words += ["trainer.early_stopping_patience=1", "trainer.gradient_accumulation_steps=4", "trainer.max_steps=40"]
    train(tiny_run(*words), tmp_path / "whole")
    with pytest.raises(RunPaused):
        train(tiny_run(*words), tmp_path / "run", Membership(pause_at=4))
    train(tiny_run(*words), tmp_path / "run")
    assert same_run(tmp_path / "run", tmp_path / "whole")
    assert read_json(tmp_path / "run" / "metrics.json")["final"]["step"] < 40


def test_what_follows_training_is_done_without_training_again(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(*COMMON, "eval.final=true")
    measured = likelihood.likelihood

    def stopped(*args: Any) -> Any:
        raise interruption.Interrupted

    monkeypatch.setattr(likelihood, "likelihood", stopped)  # as the examination finds it; training has its own
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path)
    assert read_json(tmp_path / "run.json")["status"] == "interrupted"
    before = adapter(tmp_path)
    monkeypatch.setattr(likelihood, "likelihood", measured)
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *args, **kwargs: pytest.fail("it is trained already"))
    train(run, tmp_path)
    assert "test" in read_json(tmp_path / "metrics.json")
    after = adapter(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)
