"""run.json says how a run ended, and a folder resumes its own run only."""

from collections.abc import Callable
from pathlib import Path

import pytest

from medtune.config.schema import RunConfig
from medtune.results import run_folder
from medtune.results.run_folder import RunFolder
from medtune.runtime.errors import RunFailed, RunPaused, UserError
from medtune.runtime.files import read_json
from medtune.runtime.interruption import Interrupted

Compose = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("raised", "seen", "status", "error"),
    [
        (None, None, "done", None),
        (Interrupted(), Interrupted, "interrupted", "stopped by the user or the system"),
        (RunPaused(), RunPaused, "paused", None),
        (UserError("lora.r: too high", "lora.bias: no"), UserError, "refused", "lora.r: too high\nlora.bias: no"),
        (ValueError("first line\nsecond"), RunFailed, "failed", "ValueError: first line"),
    ],
)
def test_how_a_run_ended_is_written(
    tiny_run: Compose,
    tmp_path: Path,
    raised: BaseException | None,
    seen: type[BaseException] | None,
    status: str,
    error: str | None,
) -> None:
    def run() -> None:
        with RunFolder(tiny_run(), tmp_path):
            assert read_json(tmp_path / "run.json")["status"] == "running"
            if raised:
                raise raised

    if seen is None:
        run()
    else:
        with pytest.raises(seen):
            run()
    written = read_json(tmp_path / "run.json")
    assert (written["status"], written["error"]) == (status, error)


def test_a_resumed_run_keeps_its_start_and_adds_its_seconds(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 100.0, 105.0])
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: next(clock))
    times = iter(["began", "resumed"])
    monkeypatch.setattr(run_folder, "utc_now", lambda: next(times, "later"))
    with pytest.raises(RunPaused), RunFolder(tiny_run(), tmp_path) as folder:
        folder.record({"data_fingerprint": "a", "base": "b"})
        raise RunPaused
    assert read_json(tmp_path / "run.json")["seconds"] == 10.0
    with RunFolder(tiny_run(), tmp_path):
        pass
    written = read_json(tmp_path / "run.json")
    assert (written["started"], written["seconds"], written["status"]) == ("began", 15.0, "done")
    assert (written["data_fingerprint"], len(written["resumed"])) == ("a", 1)


@pytest.mark.parametrize(("key", "what"), [("data_fingerprint", "data"), ("base", "base")])
def test_other_inputs_are_refused(tiny_run: Compose, tmp_path: Path, key: str, what: str) -> None:
    with pytest.raises(RunPaused), RunFolder(tiny_run(), tmp_path) as folder:
        folder.record({key: "before"})
        raise RunPaused
    with pytest.raises(UserError, match=f"was begun with other {what} than this"), RunFolder(tiny_run(), tmp_path) as f:
        f.record({key: "after"})
    with pytest.raises(UserError, match=f"was begun with other {what}"), RunFolder(tiny_run(), tmp_path) as f:
        f.record({key: "after"})


def test_a_folder_in_use_is_refused_and_left_as_it_is(tiny_run: Compose, tmp_path: Path) -> None:
    with RunFolder(tiny_run(), tmp_path):
        with pytest.raises(UserError, match="is in use by another process"), RunFolder(tiny_run(), tmp_path):
            pass
        assert read_json(tmp_path / "run.json")["status"] == "running"
    assert read_json(tmp_path / "run.json")["status"] == "done"
