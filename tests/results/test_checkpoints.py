"""A checkpoint is complete or is not used, and says where training was."""

from pathlib import Path
from typing import Any

import pytest

from medtune.results import checkpoints
from medtune.results.checkpoints import NoSpace, Saved, latest_complete, prune, require_space, write_manifest


def saved(step: int, *, max_steps: int = 8, evaluations: tuple[int, ...] = (), stopped: bool = False) -> Saved:
    """A checkpoint of a run that evaluates every 2 steps."""
    state: dict[str, Any] = {"global_step": step, "max_steps": max_steps, "eval_steps": 2}
    state["log_history"] = [{"step": step, "loss": 2.0}, *({"step": at, "eval_loss": 3.0} for at in evaluations)]
    state["stateful_callbacks"] = {"TrainerControl": {"args": {"should_training_stop": stopped}}}
    return Saved(Path("checkpoint"), state)


def write_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    return checkpoint


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_not_complete(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "adapter_model.safetensors"):
        (folder / name).write_bytes(name.encode() * 100)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    assert not checkpoints.is_complete(folder), "without a manifest nothing is"
    checkpoints.write_manifest(folder)
    assert checkpoints.is_complete(folder)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(b"x" + whole[1:])
    assert not checkpoints.is_complete(folder)
    (folder / file).unlink()
    assert not checkpoints.is_complete(folder)
    assert checkpoints.latest_complete(tmp_path) is None and not folder.exists()


def test_the_newest_complete_one_is_found_by_its_number(tmp_path: Path) -> None:
    for step in (8, 10, 12):
        write_checkpoint(tmp_path, step)
    for step in (8, 10):
        write_manifest(tmp_path / f"checkpoint-{step}")
    found = latest_complete(tmp_path)
    assert found is not None and (found.folder.name, found.step) == ("checkpoint-10", 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-8"], "12 is removed"


def test_all_but_some_steps_are_pruned(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, {2, 10})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_training_has_ended_after_its_last_step_or_by_early_stopping() -> None:
    assert not saved(6).finished
    assert saved(8).finished and saved(6, stopped=True).finished


@pytest.mark.parametrize(
    ("step", "evaluations", "evaluated"),
    [(3, (), True), (4, (2,), False), (4, (2, 4), True), (9, (8,), False), (9, (8, 9), True)],
)
def test_an_evaluation_that_was_due_may_be_missing(step: int, evaluations: tuple[int, ...], evaluated: bool) -> None:
    assert saved(step, max_steps=9, evaluations=evaluations).evaluated is evaluated


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    require_space(tmp_path, 0)
    with pytest.raises(NoSpace, match=r"MB are free in .*, and a checkpoint takes 1000000000000 MB"):
        require_space(tmp_path, 10**18)
