"""A folder is read whatever is missing in it."""

import json
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from medtune.results.reader import RunResult, losses


def test_a_member_is_called_by_its_folder_or_its_title(tmp_path: Path) -> None:
    folder = tmp_path / "lora.r=8"
    assert RunResult(folder, folder).name == "lora.r=8"
    assert RunResult(folder, folder, "mine").name == "mine"


def test_an_empty_folder_is_a_run_without_numbers(tmp_path: Path) -> None:
    result = RunResult(tmp_path, tmp_path)
    assert (result.run, result.metrics, result.test, result.eval_loss) == ({}, {}, {}, float("inf"))


def test_the_test_set_of_other_data_is_in_a_folder_of_its_own(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "metrics.json").write_text(json.dumps({"best": {"eval_loss": 2.5}, "test": {"answered": 1}}))
    (other / "metrics.json").write_text(json.dumps({"test": {"answered": 2}}))
    result = RunResult(tmp_path, other)
    assert (result.eval_loss, result.test) == (2.5, {"answered": 2})


def test_losses_are_columns(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"group": ["a", "b"], "tuned_nll": [1.0, 2.0]}), tmp_path / "eval_loss.parquet")
    assert losses(RunResult(tmp_path, tmp_path)) == {"group": ["a", "b"], "tuned_nll": [1.0, 2.0]}
