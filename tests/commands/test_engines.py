"""Sweeps on other engines, each an extra of the package: joblib, submitit (Slurm), Ray; and Optuna, which chooses."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from medtune.config.groups import EXTRAS, suggest_option
from medtune.config.overrides import constant_keys
from medtune.config.resolvers import folder_name
from processes import ROOT, run

RAY = ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"]
ENGINES = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
    "ray": RAY,
}


def needs(plugin: str, extra: str) -> pytest.MarkDecorator:
    """Skip where an extra is not installed."""
    missing = importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}") is None
    return pytest.mark.skipif(missing, reason=f"needs pip install 'medtune[{extra}]'")


JOBLIB, SLURM = needs("joblib_launcher", "joblib"), needs("submitit_launcher", "slurm")
RAY_INSTALLED, OPTUNA = needs("ray_launcher", "ray"), needs("optuna_sweeper", "optuna")


@pytest.fixture
def command(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    words = [word for word in tiny_overrides if not word.startswith("trainer.max_steps")]
    # In quotes: the test's folder has brackets in its name.
    return ["medtune.train", *words, f"hydra.sweep.dir='{tmp_path}/sweep'"]


def run_anew(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it as a new Python: an engine that starts processes of its own looks at how this one was started."""
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def status(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())["status"]


# --- composed and checked here, whatever runs the members -----------------------------------------------------------


@pytest.mark.parametrize(
    "choice, key, value",
    [
        pytest.param("hydra/launcher=joblib", "n_jobs", 3, marks=JOBLIB),
        pytest.param("hydra/launcher=submitit_local", "timeout_min", 720, marks=SLURM),
        pytest.param("hydra/launcher=submitit_slurm", "partition", "gpu", marks=SLURM),
        pytest.param("hydra/launcher=ray", "ray.init.address", "auto", marks=RAY_INSTALLED),
        pytest.param("hydra/sweeper=optuna", "n_trials", 3, marks=OPTUNA),
    ],
)
def test_an_engine_composes_with_its_own_keys(choice: str, key: str, value: Any) -> None:
    group = choice.partition("=")[0].replace("/", ".")
    answer = run("medtune.train", choice, f"{group}.{key}={value}", "--cfg", "hydra", "-p", group)
    assert answer.returncode == 0, answer.stderr
    found = yaml.safe_load(answer.stdout)
    for part in key.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize("choice, extra", EXTRAS.items())
def test_an_engine_that_is_not_installed_says_how(choice: str, extra: str) -> None:
    assert suggest_option(*choice.split("=")) == f"not installed: pip install 'medtune[{extra}]'"


@JOBLIB
def test_a_mistake_is_said_before_an_engine_starts(tmp_path: Path) -> None:
    words = ["hydra/launcher=joblib", "lora.r=0,8", "trainer.epocs=1", f"hydra.sweep.dir='{tmp_path}/sweep'", "-m"]
    answer = run("medtune.train", *words)
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 2
    assert "lora.r must be at least 1" in answer.stderr and not (tmp_path / "sweep").exists()


def test_members_of_another_engine_are_named_by_what_is_swept() -> None:
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "data=local", "seed=1", "lora.r=4,8"]
    assert constant_keys(words) == ["data", "seed"]
    assert folder_name(["data=local", "seed=1", "lora.r=4"], constant_keys(words)) == "lora.r=4"
    assert constant_keys([*words[:-1], "lora.r=4"]) == [], "one member has no other to differ from"


def test_ray_may_not_report() -> None:
    words = "import os; os.environ['RAY_USAGE_STATS_ENABLED'] = '1'; import medtune; "
    words += "print(os.environ['RAY_USAGE_STATS_ENABLED'])"
    assert subprocess.check_output([sys.executable, "-c", words], text=True) == "0\n"


# --- and run ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("joblib", marks=JOBLIB),
        pytest.param("submitit", marks=SLURM),
        pytest.param("ray", marks=RAY_INSTALLED),
    ],
)
def test_one_member_fails_and_the_others_train(command: list[str], tmp_path: Path, engine: str) -> None:
    swept = "lora.target_modules=[q_proj],[nope],[v_proj]"
    answer = run_anew(*command, *ENGINES[engine], "trainer.max_steps=1", swept, "-m")
    assert answer.returncode == 1, answer.stderr
    said = [line for line in answer.stderr.splitlines() if line.startswith("medtune: ")]
    assert said[0] == "medtune: 1 of 3 members failed" and len(said) == 2
    assert "has no layer nope; it has " in said[1] and "Traceback" not in answer.stdout + answer.stderr
    folders = {name: tmp_path / "sweep" / folder_name([f"lora.target_modules=[{name}]"]) for name in ("q_proj", "nope")}
    assert status(folders["q_proj"]) == "done" and status(folders["nope"]) == "refused"
    assert (folders["q_proj"] / "adapter" / "adapter_model.safetensors").is_file()
    assert len(list((tmp_path / "sweep").glob("*/run.json"))) == 3
    table = answer.stdout[answer.stdout.index("\nmember  ") :]
    assert table.count(" done\n") == 2 and table.count(" refused\n") == 1


# Slurm of one machine: `sbatch` runs an array's jobs one after another and says that it has queued them.
SBATCH = """#!/bin/bash
script="${@: -1}"; cp "$script" "$(dirname "$0")/submitted"; echo "Submitted batch job 77"
last=$(grep -oP '(?<=#SBATCH --array=0-)[0-9]+' "$script")
( for i in $(seq 0 "$last"); do
    SLURM_JOB_ID=$((78 + i)) SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$i SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1 \\
    SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NODELIST=localhost bash "$script"
done ) > /dev/null 2>&1 &
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do case $1 in --output|--error) shift;; esac; shift; done
exec "$@"
"""
SACCT = "#!/bin/bash\necho 'JobID|State|NodeList'; for i in 0 1; do echo \"77_$i|RUNNING|localhost\"; done\n"


@pytest.mark.slow
@SLURM
def test_members_are_jobs_of_a_slurm_array(command: list[str], tmp_path: Path) -> None:
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (slurm / name).write_text(script)
        (slurm / name).chmod(0o755)
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1"]
    words += ["hydra.launcher.timeout_min=720", "trainer.max_steps=1", "lora.r=2,4", "-m"]
    answer = run_anew(*command, *words, PATH=f"{slurm}:{os.environ['PATH']}")
    assert answer.returncode == 0, answer.stderr
    asked = (slurm / "submitted").read_text()
    for line in ("--partition=gpu", "--gpus-per-node=1", "--time=720", "--array=0-1%2"):
        assert f"#SBATCH {line}\n" in asked
    assert [status(tmp_path / "sweep" / name) for name in ("lora.r=2", "lora.r=4")] == ["done", "done"]


@pytest.mark.slow
@OPTUNA
def test_optuna_may_propose_a_member_twice(command: list[str], tmp_path: Path) -> None:
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=4"]
    answer = run(*command, *words, "lora.r=choice(2,4)", "trainer.max_steps=choice(1)", "-m")
    assert answer.returncode == 0, answer.stderr
    assert {status(path.parent) for path in (tmp_path / "sweep").glob("*/run.json")} == {"done"}
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["members"]
    assert len(rows) <= 2 and best["best_value"] == min(row["eval_loss"] for row in rows)


@pytest.mark.slow
@OPTUNA
def test_optuna_chooses_members_and_remembers_them(command: list[str], tmp_path: Path) -> None:
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    words += ["hydra.sweeper.sampler.seed=1", f"hydra.sweeper.storage='sqlite:///{tmp_path}/study.db'"]
    words += ["hydra.sweeper.study_name=ranks"]
    words += ["lora.r=choice(2,4)", "trainer.learning_rate=tag(log,interval(1e-4,1e-2))", "trainer.max_steps=2", "-m"]
    answer = run(*command, *words)
    assert answer.returncode == 0, answer.stderr
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    runs = [path.parent for path in (tmp_path / "sweep").glob("*/run.json")]
    losses = [json.loads((folder / "metrics.json").read_text())["best"]["eval_loss"] for folder in runs]
    assert len(runs) == 3 and {status(folder) for folder in runs} == {"done"}
    assert best["best_value"] == min(losses) and set(best["best_params"]) == {"lora.r", "trainer.learning_rate"}
    import optuna

    study = optuna.load_study(study_name="ranks", storage=f"sqlite:///{tmp_path}/study.db")
    assert sorted(trial.value for trial in study.trials) == sorted(losses)


@pytest.mark.slow
@RAY_INSTALLED
def test_ray_takes_up_a_killed_member_where_it_was(command: list[str], tmp_path: Path) -> None:
    words = [*command, *RAY, "trainer.max_steps=60", "lora.r=2,4", "-m"]
    process = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    history, log = (tmp_path / "sweep" / "lora.r=2" / name for name in ("history.jsonl", "train.log"))
    deadline = time.monotonic() + 180
    while not (history.exists() and '"step": 6' in history.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    os.kill(holder(log), signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert [status(tmp_path / "sweep" / name) for name in ("lora.r=2", "lora.r=4")] == ["done", "done"]


def holder(path: Path) -> int:
    """The process that has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink() == path:
                return int(link.parts[2])
    raise AssertionError(f"nobody writes to {path}")


@pytest.mark.slow
@JOBLIB
def test_ctrl_c_ends_all_members(command: list[str], tmp_path: Path) -> None:
    words = [*command, *ENGINES["joblib"], "trainer.max_steps=100000", "lora.r=2,4", "-m"]
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=heard, start_new_session=True,
    )  # fmt: skip
    histories = [tmp_path / "sweep" / name / "history.jsonl" for name in ("lora.r=2", "lora.r=4")]
    deadline = time.monotonic() + 180
    while not all(path.exists() for path in histories):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "medtune: interrupted; what was saved stays" in error, error
    deadline = time.monotonic() + 10
    while left := alive(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def alive(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the command's name, which may have blanks: state, parent, group.
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(path.parts[2]))
    return found
