"""Sweeps as users run them: the installed command, its files, its W&B runs, its failures and interruptions."""

import json
import os
import signal
import struct
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from medtune.config.overrides import constant_keys
from medtune.results.checkpoints import latest_complete
from medtune.runtime.files import read_jsonl
from medtune.sweep.ledger import names
from processes import ROOT, Command, run


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def execute(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, **settings)


# --- the sweep that CI and newcomers run first, from an installed wheel ---------------------------------------------


# Runs in every Python process of the environment below: a connection to anywhere but this machine is noted and refused.
NO_NETWORK = """
import socket
def refuse(self, address, connect=socket.socket.connect):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
        open({calls!r}, "a").write(f"{{address}}\\n")
        raise OSError("no network in tests")
    return connect(self, address)
socket.socket.connect = refuse
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment that holds the built wheel; its dependencies are borrowed from this one."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = execute(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT))
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("medtune-*.whl")
    assert execute(sys.executable, "-m", "venv", str(folder / "venv")).returncode == 0
    python = folder / "venv" / "bin" / "python"
    assert execute(str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)).returncode == 0
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (site / "sitecustomize.py").write_text(NO_NETWORK.format(calls=str(folder / "calls")))
    where = execute(str(python), "-c", "import medtune; print(medtune.__file__)", cwd=folder).stdout
    assert where.startswith(str(site)), where
    return python.parent


@pytest.fixture(scope="module")
def smoke(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The sweep folder of experiment=smoke, run by medtune-train in an empty folder, and what it printed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HF_"))}
    answer = execute(str(installed / "medtune-train"), "experiment=smoke", cwd=folder, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (sweep,) = (folder / "multirun" / "smoke").iterdir()
    return sweep, answer.stdout


@pytest.mark.slow
def test_installed_command_composes_from_any_folder(installed: Path, tmp_path: Path) -> None:
    answer = execute(
        str(installed / "medtune-train"), "experiment=llama3_8b", "--cfg", "job", "--resolve", cwd=tmp_path
    )
    assert answer.returncode == 0 and "hub_id: meta-llama/Meta-Llama-3-8B-Instruct" in answer.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_smoke_sweep_prints_base_and_members(smoke: tuple[Path, str]) -> None:
    sweep, said = smoke
    members = ["lora.r=4", "lora.r=8"]
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == members
    table = said[said.index("\nmember  ") + 1 :].splitlines()
    assert table[2].startswith("base model")
    for line, member in zip(table[3:5], members, strict=True):
        metrics = read_json(sweep / member / "metrics.json")
        assert line.split()[:2] == [member, f"{metrics['best']['eval_loss']:.4f}"]
        assert (sweep / member / "adapter" / "adapter_model.safetensors").is_file()
    assert f"adapters: {sweep.relative_to(sweep.parents[2])}/MEMBER/adapter" in table[5:7], (
        "below the table and its note"
    )
    assert "Patient: I have a fever and a sore throat. What should I do?" in said
    ledger = read_json(sweep / "sweep.json")["members"]
    assert [(row["folder"], row["status"]) for row in ledger] == [(member, "done") for member in members]
    assert "WARNING" not in said, "the libraries' messages to programmers are off"


def written(sweep: Path) -> dict[Path, int]:
    """When members' files were last written; W&B's own process ends its log a moment after the sweep has ended."""
    files = (path for path in sweep.glob("lora*/**/*") if not {".hydra", "logs"} & set(path.parts))
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_the_same_sweep_again_does_nothing_twice(installed: Path, smoke: tuple[Path, str]) -> None:
    sweep, said = smoke
    before = written(sweep)
    answer = execute(str(installed / "medtune-train"), f"sweep={sweep}", cwd=sweep.parent.parent.parent)
    assert answer.returncode == 0, answer.stderr
    assert "lora.r=4 is done already" in answer.stdout and "lora.r=8 is done already" in answer.stdout
    assert answer.stdout[answer.stdout.index("\nmember ") :] == said[said.index("\nmember ") :]
    assert written(sweep) == before


def test_a_sweep_that_is_not_there_is_not_gone_on_with(tmp_path: Path) -> None:
    answer = run("medtune.train", f"sweep={tmp_path}")
    assert answer.returncode == 2
    assert (
        answer.stderr
        == f"medtune: sweep={tmp_path}: no sweep in it to go on with: name a folder that holds a sweep.json\n"
    )


@pytest.mark.slow
def test_nothing_is_sent_anywhere(installed: Path, smoke: tuple[Path, str]) -> None:
    calls = installed.parent.parent / "calls"
    assert not calls.exists(), calls.read_text()
    probe = "import socket; socket.create_connection(('192.0.2.1', 9))"
    assert execute(str(installed / "python"), "-c", probe).returncode == 1
    assert calls.exists(), "the guard must see a connection, or this test tests nothing"
    calls.unlink()


@pytest.mark.slow
def test_members_start_from_the_same_base(smoke: tuple[Path, str]) -> None:
    sweep, _ = smoke
    runs = [read_json(path) for path in sorted(sweep.glob("*/run.json"))]
    metrics = [read_json(path) for path in sorted(sweep.glob("*/metrics.json"))]
    assert runs[0]["base"] == runs[1]["base"] and runs[0]["data_fingerprint"] == runs[1]["data_fingerprint"]
    assert metrics[0]["base"] == metrics[1]["base"]


@pytest.mark.slow
def test_offline_wandb_runs_read_back(smoke: tuple[Path, str]) -> None:
    sweep, _ = smoke
    runs = []
    for member in sorted(path for path in sweep.iterdir() if path.is_dir()):
        (file,) = member.glob("wandb/offline-run-*/run-*.wandb")
        recorded = read_wandb(file)
        runs.append(recorded["run"])
        assert recorded["exit"] == 0 and recorded["run"].display_name == member.name
        assert recorded["config"]["lora"]["r"] == int(member.name.removeprefix("lora.r="))

        written = [json.loads(line) for line in (member / "history.jsonl").read_text().splitlines()]
        for name in ("eval/loss", "eval/perplexity", "train/loss", "train/tokens_per_second", "train/peak_memory_gb"):
            series = {row["train/global_step"]: row[name] for row in recorded["history"] if name in row}
            key = name.replace("eval/", "eval_").removeprefix("train/")
            assert series == {row["step"]: row[key] for row in written if key in row} and len(series) >= 3

        samples = [json.loads(line) for line in (member / "samples.jsonl").read_text().splitlines()]
        rows = []
        for entry in recorded["history"]:
            if "samples.path" in entry or "samples" in entry:
                table = entry.get("samples") or {"path": entry["samples.path"]}
                saved = read_json(file.parent / "files" / table["path"])
                rows += [dict(zip(saved["columns"], values, strict=True)) for values in saved["data"]]
        assert rows == samples and len(rows) == 3 * 6
    assert len({r.run_id for r in runs}) == 2
    assert {r.run_group for r in runs} == {f"smoke/{sweep.name}"}


def read_wandb(path: Path) -> dict[str, Any]:
    """Read an offline run: a LevelDB log of 32 KiB blocks; records are crc32 (4), length (2), type (1), data."""
    data, place, record = path.read_bytes(), 7, b""
    found: dict[str, Any] = {"history": [], "config": {}, "run": None, "exit": None}
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part = data[place + 7 : place + 7 + length]
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == checksum
        place, record = place + 7 + length, record + part
        if kind not in (1, 4):  # a first or middle part
            continue
        message = wandb_internal_pb2.Record()
        message.ParseFromString(record)
        record = b""
        which = message.WhichOneof("record_type")
        if which == "run":
            found["run"] = message.run
            found["config"] |= {u.key: json.loads(u.value_json) for u in message.run.config.update}
        elif which == "history":
            items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in message.history.item}
            found["history"].append(items)
        elif which == "exit":
            found["exit"] = message.exit.exit_code
    return found


# --- failures and interruptions --------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    words = [word for word in tiny_overrides if not word.startswith("trainer.max_steps")]
    return ["medtune.train", *words, f"hydra.sweep.dir={tmp_path}/sweep"]


def test_one_member_fails_and_the_others_train(command: list[str], tmp_path: Path) -> None:
    answer = run(*command, "trainer.max_steps=1", "lora.target_modules=[q_proj],[nope],[v_proj]", "-m")
    assert answer.returncode == 1
    said = answer.stderr.splitlines()
    assert said[0] == "medtune: 1 of 3 members failed" and len(said) == 2, answer.stderr
    assert "lora.target_modules=[nope]" in said[1]
    assert ": lora.target_modules: medtune/tiny-test has no layer nope; it has " in said[1]
    assert "Traceback" not in answer.stdout
    ledger = read_json(tmp_path / "sweep" / "sweep.json")["members"]
    assert [row["status"] for row in ledger] == ["done", "refused", "done"]
    assert [row["eval_loss"] is None for row in ledger] == [False, True, False]
    assert "has no layer nope" in (tmp_path / "sweep" / ledger[1]["folder"] / "train.log").read_text()
    table = answer.stdout[answer.stdout.index("\nmember  ") :]
    assert table.count("done") == 2 and "refused" in table


SECOND = {
    "hydra.launcher.processes=1": "waiting",
    "hydra.launcher.processes=2": "interrupted",
    "hydra.launcher.width=2": "interrupted",
}


@pytest.mark.parametrize(
    "way, stop", zip(SECOND, [signal.SIGTERM, signal.SIGINT, signal.SIGTERM], strict=True), ids=lambda value: str(value)
)
def test_an_interrupted_sweep_says_so_and_keeps_what_was_saved(
    command: list[str], tmp_path: Path, stop: signal.Signals, way: str
) -> None:
    words = [*command, "trainer.max_steps=100000", "lora.r=2,4", way, "-m"]
    process = Command(*words)
    running = {"lora.r=2: step 6/", "lora.r=4: step 6/"} if SECOND[way] == "interrupted" else {"lora.r=2: step 6/"}
    for line in iter(process.stdout.readline, ""):
        running -= {words for words in running if words in line}
        if not running:
            break
    assert not running, process.stderr.read()
    process.send_signal(stop)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "medtune: interrupted; what was saved stays"
    assert "Traceback" not in error
    ledger = read_json(tmp_path / "sweep" / "sweep.json")["members"]
    assert [row["status"] for row in ledger] == ["interrupted", SECOND[way]]
    for row in ledger:
        folder = tmp_path / "sweep" / row["folder"]
        if row["status"] == "interrupted":
            saved = latest_complete(folder / "checkpoints")
            steps = [line["step"] for line in read_jsonl(folder / "history.jsonl")]
            assert saved and saved.step == max(steps), "of the last step, not of the last evaluation"


def test_a_failing_run_leaves_its_traceback_in_the_log(command: list[str], tmp_path: Path) -> None:
    # SGD at this rate overflows within a few steps.
    words = [*command, "trainer.max_steps=50", "trainer.optim=sgd", "trainer.learning_rate=1"]
    words += ["trainer.max_grad_norm=0", "lora.lora_alpha=1e30", f"hydra.run.dir={tmp_path}/run"]
    answer = run(*words)
    assert answer.returncode == 1
    assert answer.stderr.startswith("medtune: Diverged: ") and answer.stderr.count("\n") == 1
    assert "Traceback" not in answer.stdout and "Diverged" not in answer.stdout, "said once, in one line"
    assert read_json(tmp_path / "run" / "run.json")["status"] == "failed"
    log = (tmp_path / "run" / "train.log").read_text()
    assert "Traceback" in log and "Diverged" in log
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_second_run_into_a_folder_changes_nothing_there(tmp_path: Path) -> None:
    first = tmp_path / "run"
    (first / ".hydra").mkdir(parents=True)
    (first / ".hydra" / "config.yaml").write_text("kept")
    (first / "run.json").write_text("{}")
    answer = run("medtune.train", "lora.r=64", f"hydra.run.dir={first}")
    assert answer.returncode == 2 and "already holds a run" in answer.stderr and answer.stderr.count("\n") == 1
    assert (first / ".hydra" / "config.yaml").read_text() == "kept"


def test_members_are_named_by_what_differs() -> None:
    members = [["data=local", "seed=1", "lora.r=8"], ["data=local", "seed=1", "lora.r=16"]]
    assert names(members, ["data", "seed"]) == ["lora.r=8", "lora.r=16"]
    assert names(members[:1], ["data", "seed"]) == ["lora.r=8"], "of one alone, what a sweeper chose"
    assert names(members[:1], []) == ["data=local,seed=1,lora.r=8"]
    assert names([["a=1", "b=2"], ["a=2", "b=3"]], []) == ["a=1,b=2", "a=2,b=3"]
    assert constant_keys(["data=local", "seed=1", "lora.r=8,16", "hydra.sweep.dir=x"]) == ["data", "seed"]
    assert constant_keys(["data=local"]) == []
