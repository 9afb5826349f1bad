"""A folder of the cache is made once, and is there only when it is complete."""

import multiprocessing
import os
from pathlib import Path

import pytest

from medtune.runtime.cache import cached_folder
from medtune.runtime.errors import UserError


def slow_make(folder: Path) -> None:
    """Leaves a mark of each process that makes the folder."""
    (folder / str(os.getpid())).write_text("")
    for _ in range(200):
        os.sched_yield()


def use_cache(cache: str) -> None:
    os.environ["MEDTUNE_CACHE"] = cache
    made = cached_folder("thing", slow_make)
    assert len(list(made.iterdir())) == 1


def test_cache_is_made_once_by_processes_that_race(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=use_cache, args=(str(tmp_path),)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list((tmp_path / "thing").iterdir())) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"thing", "thing.lock"}


def test_an_unfinished_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path))

    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        cached_folder("thing", fails)
    assert {path.name for path in tmp_path.iterdir()} <= {"thing.lock"}
    assert cached_folder("thing", slow_make).is_dir()


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDTUNE_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match=r"cannot write the cache .* set MEDTUNE_CACHE"):
        cached_folder("thing", slow_make)
