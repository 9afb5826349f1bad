"""A command does its work without a reader of what it prints, and in any environment."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import conversations, write_jsonl
from medtune.runtime.files import read_json
from medtune.runtime.screen import Screen
from processes import ROOT, Command, run

SMALL = ("eval.final=false", "wandb=disabled")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gbk"])
def test_what_cannot_be_written_is_replaced(encoding: str) -> None:
    raw = io.BytesIO()
    screen = Screen(raw, encoding=encoding, errors="replace")
    print("Fieber über 39 °C 😴 ⟦頭痛⟧ \ud83d", file=screen, flush=True)
    assert b"Fieber" in raw.getvalue() and b"39" in raw.getvalue()


def test_a_reader_that_is_gone_stops_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    with Screen(os.fdopen(write, "wb"), encoding="utf-8", line_buffering=True) as screen:
        for _ in range(3):
            assert screen.write("a line\n") == 7
        screen.flush()


def test_a_run_is_done_though_nobody_reads_it(tiny_overrides: list[str], tmp_path: Path) -> None:
    words = [*tiny_overrides, *SMALL, f"hydra.run.dir={tmp_path}/run"]
    command = Command("medtune.train", *words, PYTHONIOENCODING="ascii")
    command.stdout.close()
    assert command.wait(timeout=300) == 0
    assert read_json(tmp_path / "run" / "run.json")["status"] == "done"
    assert command.stderr.read() == ""


def test_data_is_written_out_though_nobody_reads_the_report(tiny_overrides: list[str], tmp_path: Path) -> None:
    command = Command("medtune.prepare", *tiny_overrides, f"out={tmp_path}/out", f"hydra.run.dir={tmp_path}/look")
    command.stdout.close()
    assert command.wait(timeout=300) == 0 and (tmp_path / "out" / "train.parquet").is_file()


def test_answers_with_any_line_ends_are_shown_and_resumed(tiny_overrides: list[str], tmp_path: Path) -> None:
    rows = conversations(40)
    for row in rows:
        row["messages"][-1]["content"] += " One\u2028two\x85three."
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    words = [*tiny_overrides, *SMALL, f"data.path='{path}'", "data/preparation=none", f"hydra.run.dir={tmp_path}/run"]
    answer = run("medtune.train", *words)
    assert answer.returncode == 0 and "base model" in answer.stdout, answer.stderr


def test_what_another_job_left_behind_is_ignored(tiny_overrides: list[str], tmp_path: Path) -> None:
    left = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    answer = run("medtune.train", *tiny_overrides, *SMALL, f"hydra.run.dir={tmp_path}/run", **left)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.startswith("medtune: left over from another job, ignored: RANK, WORLD_SIZE")


def test_several_processes_of_torchrun_are_refused() -> None:
    answer = run("medtune.train", TORCHELASTIC_RUN_ID="x", WORLD_SIZE="2")
    assert answer.returncode == 2 and "a run is one: start it as python -m medtune.train" in answer.stderr


def test_a_home_that_cannot_be_written_is_not_needed(tiny_overrides: list[str], tmp_path: Path) -> None:
    nowhere = {"HOME": "/dev/null/home", "HF_HOME": "/dev/null/hf", "MEDTUNE_CACHE": str(tmp_path / "cache")}
    words = [*tiny_overrides, "wandb=offline", f"hydra.run.dir={tmp_path}/run"]
    answer = run("medtune.train", *words, **nowhere)
    assert answer.returncode == 0 and "Traceback" not in answer.stderr, answer.stderr
    assert "W&B" not in answer.stdout + answer.stderr and list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_cache_that_cannot_be_written_is_one_line(tiny_overrides: list[str], tmp_path: Path) -> None:
    words = [*tiny_overrides, *SMALL, f"hydra.run.dir={tmp_path}/run"]
    answer = run("medtune.train", *words, MEDTUNE_CACHE="/dev/null/cache")
    assert answer.returncode == 2 and "set MEDTUNE_CACHE" in answer.stderr and answer.stderr.count("\n") == 1


def test_a_working_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.rmdir({str(gone)!r}); import medtune.train; medtune.train.main()"
    words = [sys.executable, "-c", code]
    answer = subprocess.run(words, cwd=gone, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (
        answer.returncode == 2 and answer.stderr == "medtune: the working folder is gone: change to one that exists\n"
    )


def test_ctrl_c_that_takes_the_reader_too_saves_the_run(tiny_overrides: list[str], tmp_path: Path) -> None:
    words = [*tiny_overrides, *SMALL, "trainer.max_steps=400", "eval.every=1000", f"hydra.run.dir={tmp_path}/run"]
    command = Command("medtune.train", *words)
    for line in command.stdout:
        if "adapter:" in line:
            break
    command.stdout.close()
    command.stderr.close()
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=300) == 130
    assert read_json(tmp_path / "run" / "run.json")["status"] == "interrupted"
