"""W&B never stops training, never asks, and never decides what is recorded in the files."""

import json
from pathlib import Path

import pytest

from medtune.config.enums import WandbMode
from medtune.config.schema import Wandb
from medtune.results.tracking import SAMPLE_COLUMNS, FileTracker, RunIdentity, Trackers, WandbTracker, require_account
from medtune.runtime.errors import UserError

IDENTITY = RunIdentity("member", "sweep", "now", {"lora": {"r": 4}})
OFFLINE, DISABLED = Wandb(WandbMode.offline, "medtune", None), Wandb(WandbMode.disabled, "medtune", None)


def test_online_without_an_account_is_refused_without_a_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("W&B asked for a key"))
    with pytest.raises(UserError, match=r"wandb=online needs an account: set WANDB_API_KEY"):
        require_account(WandbMode.online)
    require_account(WandbMode.offline)


def test_an_unreachable_server_means_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    init = wandb.init

    def unreachable(**arguments: object) -> object:
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("timed out\nmore")
        return init(**arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(wandb, "init", unreachable)
    tracker = WandbTracker(tmp_path, Wandb(WandbMode.online, "medtune", None), IDENTITY)
    tracker.log(1, {"loss": 2.0})
    assert tracker.run.offline
    tracker.finish(failed=False)
    assert "W&B cannot record online (timed out)" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("mode", [WandbMode.offline, WandbMode.disabled])
def test_files_do_not_depend_on_wandb(tmp_path: Path, mode: WandbMode) -> None:
    files = FileTracker(tmp_path, None)
    with Trackers(files, WandbTracker(tmp_path, Wandb(mode, "medtune", None), IDENTITY)) as tracker:
        tracker.log(0, {"eval_loss": 3.0})
        row = dict.fromkeys(SAMPLE_COLUMNS[1:]) | {"prompt": "p", "answer": "schläft 😴", "stop": "length", "tokens": 4}
        tracker.log_samples(0, [row])
        tracker.log_samples(5, [row])
    assert json.loads(files.history.read_text()) == {"step": 0, "eval_loss": 3.0}
    assert [json.loads(line) for line in files.samples.read_text().splitlines()] == [
        {"step": 0, **row},
        {"step": 5, **row},
    ]
    assert (tmp_path / "wandb").exists() == (mode is WandbMode.offline)


def test_a_failing_run_ends_its_wandb_run_as_failed(tmp_path: Path) -> None:
    ended = []
    tracker = WandbTracker(tmp_path, DISABLED, IDENTITY)
    with pytest.raises(RuntimeError), Trackers(FileTracker(tmp_path, None), tracker):
        tracker.run = type("Run", (), {"finish": lambda self, exit_code: ended.append(exit_code)})()
        raise RuntimeError
    assert ended == [1]


def test_wandb_errors_never_reach_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def log(self, values: object) -> None:
            raise OSError("disk full")

    files, broken = FileTracker(tmp_path, None), WandbTracker(tmp_path, DISABLED, IDENTITY)
    with Trackers(files, broken) as tracker:
        broken.run = Broken()
        tracker.log(1, {"loss": 2.0})
        tracker.log(2, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in files.history.read_text().splitlines()] == [1, 2]
    assert caplog.text.count("W&B stopped (disk full)") == 1


def test_wandb_that_cannot_start_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise wandb.errors.UsageError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    files, wandb_tracker = FileTracker(tmp_path, None), WandbTracker(tmp_path, OFFLINE, IDENTITY)
    with Trackers(files, wandb_tracker) as tracker:
        tracker.log(1, {"loss": 2.0})
    assert wandb_tracker.run is None and files.history.exists()
