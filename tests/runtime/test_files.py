"""Files are read whole or not at all, and what is not JSON is not written."""

from pathlib import Path

import pytest

from medtune.runtime.files import append_jsonl, display_path, read_json, read_jsonl, write_json


def test_json_comes_back_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"answer": "schläft 😴"})
    assert read_json(tmp_path / "run.json") == {"answer": "schläft 😴"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_json_cannot_say_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "run.json", {"loss": float("nan")})
    assert read_json(tmp_path / "run.json") == {"loss": 1.0}


def test_a_missing_or_incomplete_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"loss": 1.')
    assert read_json(tmp_path / "half.json") == read_json(tmp_path / "none.json") == {}
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    append_jsonl(path, [{"step": 1}, {"step": 2}])
    with path.open("a") as file:
        file.write('{"step": 3')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_path_is_shown_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert display_path(tmp_path / "multirun" / "a") == "multirun/a"
    assert display_path(tmp_path.parent) == str(tmp_path.parent)
