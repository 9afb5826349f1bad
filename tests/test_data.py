"""Rows in, conversations out, every row accounted for; the bundled consultations are what they claim to be."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import compose, conversations, write_jsonl

from medtune.config import Data, Refusal
from medtune.data import BUNDLED, Conversation, describe_rejects, prepare
from medtune.data.split import split
from medtune.result import write_jsonl as write_rejects

GOOD = [{"role": "user", "content": "I have a cough."}, {"role": "assistant", "content": "Rest and drink."}]


def local(path: Path, *overrides: str) -> Data:
    return compose("data=local", f"data.path='{path}'", *overrides).data


QA = ("data.columns.messages=null", "data.columns.question=Patient", "data.columns.answer=Doctor")


@pytest.fixture(scope="module")
def bundled() -> list[dict]:
    return [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]


def test_bundled_consultations_are_what_they_claim(bundled: list[dict]) -> None:
    assert len(bundled) >= 200
    assert len({row["topic"] for row in bundled}) >= 25
    assert all(list(row) == ["messages", "topic", "group", "red_flag"] for row in bundled)
    assert sum(len(row["messages"]) > 2 for row in bundled) >= len(bundled) / 3
    assert sum(row["red_flag"] for row in bundled) >= 30
    questions = [row["messages"][0]["content"] for row in bundled]
    assert len(set(questions)) == len(questions)
    words = [len(q.split()) for q in questions]
    assert sum(w <= 12 for w in words) > 40 and sum(w >= 70 for w in words) > 40, "terse and rambling patients"
    assert sum(q == q.lower() for q in questions) > 20, "patients who do not use capitals"


def test_bundled_red_flags_are_answered_with_urgency(bundled: list[dict]) -> None:
    urgent = re.compile(r"emergency|ambulance|right now|at once|immediately|straight away|today|tonight|crisis", re.I)
    for row in bundled:
        if row["red_flag"]:
            assert urgent.search(" ".join(m["content"] for m in row["messages"] if m["role"] == "assistant")), row


def test_bundled_doctors_give_no_doses_names_links_or_phone_numbers(bundled: list[dict]) -> None:
    dose = re.compile(r"\d\s?(mg|mcg|µg|g|ml|units?|tablets?|capsules?|drops?|puffs?)\b", re.I)
    private = re.compile(r"https?:|www\.|@|\bDr\.? [A-Z]|\b(911|112|999|988)\b(?!/)|\d{3}[ -]\d{3,4}\b")
    for row in bundled:
        for message in row["messages"]:
            assert not private.search(message["content"]), message
            if message["role"] == "assistant":
                assert not dose.search(message["content"]), message


def test_bundled_set_loses_no_row_and_splits_without_leaks() -> None:
    prepared = prepare(compose().data)
    parts = [prepared.train, prepared.validation, prepared.test]
    assert prepared.rejects == [] and sum(map(len, parts)) == len(BUNDLED.read_text().splitlines())
    groups = [{c.group for c in part} for part in parts]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert all(len(part) >= 20 for part in parts)
    assert all(c.messages[0]["role"] == "system" for part in parts for c in part)
    asked = {c.messages[1]["content"] for part in parts for c in part}
    assert not asked & set(compose().samples.prompts), "the sample prompts must be new to the model"


def test_split_moves_no_old_row_when_rows_are_added(tmp_path: Path) -> None:
    few = prepare(local(write_jsonl(tmp_path / "few.jsonl", conversations(60)), "data.columns.group=group"))
    many = prepare(local(write_jsonl(tmp_path / "many.jsonl", conversations(200)), "data.columns.group=group"))
    for name in ("train", "validation", "test"):
        old = {c.group for c in getattr(few, name)}
        assert old and old <= {c.group for c in getattr(many, name)}
    assert few.fingerprint != many.fingerprint


def test_fractions_hold_on_average() -> None:
    rows = [Conversation(i, GOOD, f"group {i}") for i in range(4000)]
    sizes = [len(part) for part in split(rows, 0.2, 0.1)]
    assert sizes == [pytest.approx(n, rel=0.1) for n in (2800, 800, 400)]


def test_rows_without_a_group_stay_with_their_question(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Question  {i // 4}"}, GOOD[1]]} for i in range(200)]
    prepared = prepare(local(write_jsonl(tmp_path / "rows.jsonl", rows)))
    groups = Counter(c.group for part in (prepared.train, prepared.validation, prepared.test) for c in part)
    assert set(groups.values()) == {4}
    assert not {c.group for c in prepared.train} & {c.group for c in prepared.validation}


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_every_file_kind_gives_the_same_conversations(tmp_path: Path, kind: str) -> None:
    rows = [{"Patient": f"Ich huste, “sehr”,\nseit {i} Tagen.", "Doctor": f"Rest {i}."} for i in range(40)]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in rows).encode())
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as lines:
            writer = csv.DictWriter(lines, ["Patient", "Doctor"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    prepared = prepare(local(path, *QA))
    both = sorted((c.row, c.messages[1]["content"], c.messages[2]["content"]) for c in prepared.train)
    assert prepared.rejects == []
    assert all(question == rows[n - 1]["Patient"] and reply == rows[n - 1]["Doctor"] for n, question, reply in both)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (GOOD[:1], "without an answer"),
        ([GOOD[0], {"role": "assistant", "content": "  "}], "without an answer"),
        ([GOOD[0], {"role": "assistant", "content": None}], "without an answer"),
        ([], "without an answer"),
        ([{"role": "nurse", "content": "Hello."}, GOOD[1]], "with the unknown role 'nurse'"),
        ([{"role": "user", "content": ["Hello"]}, GOOD[1]], "whose user message is not text"),
        ([GOOD[0], GOOD[0], GOOD[1]], "whose roles do not alternate"),
        ([GOOD[1]], "whose roles do not alternate"),
        ([{"role": "user", "content": ""}, GOOD[1]], "with an empty message"),
        ("no list", "whose messages are no list"),
        (None, "whose messages are no list"),
    ],
)
def test_a_bad_row_costs_itself_and_is_kept_with_its_reason(tmp_path: Path, messages: object, reason: str) -> None:
    rows = conversations(40)
    rows.insert(6, {"messages": messages, "group": "bad"})
    prepared = prepare(local(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert [reject.row for reject in prepared.rejects] == [7]
    assert reason in prepared.rejects[0].reason and prepared.rejects[0].content == rows[6]
    assert sum(map(len, (prepared.train, prepared.validation, prepared.test))) == 40
    assert "1 row " in describe_rejects(prepared.rejects) and "(row 7)" in describe_rejects(prepared.rejects)


def test_broken_json_lines_cost_only_themselves(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", conversations(40))
    hostile = ["[1, 2]", '{"messages": ' + "9" * 5000 + "}", "[" * 100_000, '{"messages": "\\ud83d"}']
    hostile += [json.dumps({"messages": [{"role": "user", "content": "half a \ud83d"}, GOOD[1]]})]
    path.write_text('{"messages": [\n' + path.read_text() + "\n".join(hostile), encoding="utf-8")
    prepared = prepare(local(path))
    assert [(r.row, r.reason) for r in prepared.rejects] == [
        (1, "of broken JSON"),
        (42, "that are no {column: value} objects"),
        (43, "of broken JSON"),
        (44, "of broken JSON"),
        (45, "whose messages are no list of {role, content}"),
        (46, "with broken characters (half of a surrogate pair)"),
    ]
    write_rejects(tmp_path / "rejects.jsonl", prepared.rejects)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 6


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("empty.jsonl", "", "the file is empty"),
        ("blank.jsonl", "\n\n", "holds no usable conversation: it has no rows"),
        ("rows.txt", "x", r"cannot read \.txt; it must end in \.json, \.jsonl, \.csv, \.parquet"),
        ("rows.json", "[{", "broken JSON in line 1"),
        ("rows.json", "{}", "must hold a list of rows"),
        ("rows.parquet", "x", "not a Parquet file"),
        ("rows.jsonl", b'{"messages": "\xe9"}', "not UTF-8 text"),
        (
            "rows.jsonl",
            '{"question": "q", "reply": "a"}',
            "it has question, reply: data.columns.messages=COL",
        ),
        ("rows.csv", "Patient;Doctor\nq;a\n", r"save the file with commas between the columns, not ';'"),
        ("rows.csv", 'messages\n"never closed\n', "broken CSV near line 1: unexpected end"),
        ("rows.jsonl", '{"messages": []}\n' * 3, r"3 rows without an answer \(rows 1, 2, 3\)"),
        ("rows.jsonl", json.dumps({"messages": GOOD}), "the (training|validation) split is empty: .* 1 groups"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str, content: str | bytes, line: str) -> None:
    with pytest.raises(Refusal, match=line) as refusal:
        prepare(local(write(tmp_path / name, content)))
    assert len(refusal.value.lines) == 1


def test_a_file_that_goes_missing_is_one_line(tmp_path: Path) -> None:
    data = local(write(tmp_path / "rows.jsonl", "{}"))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(Refusal, match="No such file or directory"):
        prepare(data)
