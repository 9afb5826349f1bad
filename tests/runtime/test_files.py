"""Files are read whole or not at all, and what is not JSON is not written."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_only_a_line_feed_ends_a_json_line(tmp_path: Path) -> None:
    texts = [f"one{mark}two" for mark in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"]
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"text": text} for text in texts])
    assert [row["text"] for row in read_jsonl(path)] == texts
    with path.open("a", encoding="utf-8") as file:
        file.write('{"text": "cut o')
    assert len(read_jsonl(path)) == len(texts)


CHARACTERS = "a \"\\'{}[],:é病😴\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\n\t\0\x7f\ufeff\u200b"


@settings(max_examples=10_000, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 2**64))
def test_what_is_appended_reads_back(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance, path = Random(seed), tmp_path_factory.getbasetemp() / "any.jsonl"
    texts = ["".join(chance.choices(CHARACTERS, k=chance.randrange(9))) for _ in range(chance.randrange(5))]
    path.unlink(missing_ok=True)
    append_jsonl(path, [{"text": text} for text in texts])
    assert [row["text"] for row in read_jsonl(path)] == texts
