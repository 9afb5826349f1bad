"""Every public layout is recognised and read as what it says; every file that cannot be read is one line."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import compose, conversations, write_jsonl
from medtune.config.enums import Format
from medtune.config.schema import Data
from medtune.data.prepared import prepare
from medtune.data.reading.formats import detect_format
from medtune.data.reading.normalize import normalize
from medtune.data.reading.rejects import RejectRow
from medtune.data.reading.sources import read_rows
from medtune.runtime.errors import UserError

PAIRS = [
    (row["messages"][0]["content"], row["messages"][1]["content"])
    for row in conversations(24)
    if len(row["messages"]) == 2
]
INSTRUCTION = "If you are a doctor, please answer the medical questions based on the patient's description."


def local(path: Path, *overrides: str) -> Data:
    return compose("data=local", f"data.path='{path}'", *overrides).data


def read(data: Data) -> list[Any]:
    """The messages, or the reason against them, of every row."""
    rows = list(read_rows(data, "data"))
    layout = detect_format(rows, data, "data")
    found = []
    for _, row in rows:
        try:
            found.append(normalize(row, layout, "You are a doctor.", Counter()))
        except RejectRow as unusable:
            found.append(str(unusable))
    return found


def asked_and_answered(found: list[Any]) -> list[tuple[str, str]]:
    return [(messages[1]["content"], messages[2]["content"]) for messages in found]


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS = {
    "messages": lambda q, a: {"messages": said(q, a)},
    "sharegpt": lambda q, a: {"id": 1, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "prompt_completion of messages": lambda q, a: {"prompt": said(q, a)[:1], "completion": said(q, a)[1:]},
    "alpaca": lambda q, a: {"instruction": INSTRUCTION, "input": q, "output": a},
    "alpaca without input": lambda q, a: {"instruction": q, "output": a},
    "question_answer": lambda q, a: {"qtype": "information", "Question": q, "Answer": a},
    "question_answer of patient and doctor": lambda q, a: {"Description": "Q. Is it bad?", "Patient": q, "Doctor": a},
    "question_answer with three answers": lambda q, a: {
        "input": q,
        "answer_icliniq": a,
        "answer_chatgpt": "An answer.",
    },
    "question_answer with reasoning": lambda q, a: {"Question": q, "Complex_CoT": "Hm.", "Response": a},
    "turns": lambda q, a: {"description": "Q.", "utterances": [f"patient: {q}", f"doctor: {a}"]},
    "turns as text": lambda q, a: {"text": f"Patient: {q}\nDoctor: {a}"},
}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_in_every_kind_of_file(tmp_path: Path, layout: str, kind: str) -> None:
    rows = [ROWS[layout](question, answer) for question, answer in PAIRS]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in rows).encode())
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as lines:
            writer = csv.DictWriter(lines, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(
                {name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()}
                for row in rows
            )
    assert asked_and_answered(read(local(path))) == PAIRS
    found = detect_format(list(read_rows(local(path), "data")), local(path), "data")
    assert found.format.name == layout.split()[0] and found.format.name in str(found)
    forced = local(path, f"data.format={found.format.name}")
    assert detect_format(list(read_rows(forced, "data")), forced, "data") == found


PUBLIC = {
    "ai_medical_chatbot": ("rows.csv", ROWS["question_answer of patient and doctor"]),
    "healthcaremagic": ("rows.jsonl", ROWS["alpaca"]),
    "icliniq": ("rows.jsonl", ROWS["question_answer with three answers"]),
    "medquad": ("rows.csv", ROWS["question_answer"]),
    "medical_meadow": (
        "rows.json",
        lambda q, a: {"instruction": "Answer this question truthfully", "input": q, "output": a},
    ),
}


@pytest.mark.parametrize("source", PUBLIC)
@pytest.mark.parametrize("from_hub", [True, False])
def test_every_public_source_is_read_from_the_hub_or_from_a_copy_of_its_file(
    tmp_path: Path, source: str, from_hub: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, row = PUBLIC[source]
    rows = [row(question, answer) for question, answer in PAIRS]
    folder = tmp_path / "hub-set"  # `datasets` loads a folder as it loads a repository of the hub
    folder.mkdir()
    if from_hub:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
        data = compose(f"data={source}", f"data.hub_id='{folder}'", "data.revision=null").data
    else:
        path = folder / name
        if name.endswith("csv"):
            with path.open("w", newline="") as lines:
                writer = csv.DictWriter(lines, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text(json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows)))
        data = compose(f"data={source}", f"data.path='{path}'").data
    assert asked_and_answered(read(data)) == PAIRS
    assert data.license and (source == "medquad") is data.redistributable


def test_every_hub_source_is_pinned() -> None:
    for source in PUBLIC:
        revision = compose(f"data={source}").data.revision
        assert revision and len(revision) == 40


def test_a_hub_set_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"keivalya/MedQuad-MedicalQnADataset@5b0961f cannot be had .*no data set is cached"
    ):
        prepare(compose("data=medquad").data)
    (tmp_path / "owner___other-set").mkdir()
    with pytest.raises(UserError, match=r"cached here: owner/other-set; .* name it with data\.path=FILE") as refusal:
        prepare(compose("data=medquad").data)
    assert len(refusal.value.lines) == 1


def test_multi_turn_dialogues(tmp_path: Path) -> None:
    rows = [
        {
            "utterances": [
                "patient: I cough.",
                "doctor: Since when?",
                "patient: A week.",
                "patient: At night.",
                "doctor: Rest.",
            ]
        },
        {"utterances": ["patient: I cough.", "doctor: Rest.", "patient: Thank you!"]},
        {"utterances": ["doctor: Hello.", "patient: I cough."]},
        {"utterances": ["I cough.", "Rest."]},
    ]
    turns, thanks, greeting, unmarked = read(local(write_jsonl(tmp_path / "rows.jsonl", rows)))
    contents = [message["content"] for message in turns[1:]]
    assert contents == ["I cough.", "Since when?", "A week.\nAt night.", "Rest."]
    assert [message["role"] for message in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in thanks[1:]] == ["I cough.", "Rest."], "nothing is taught after an answer"
    assert "without an answer" in greeting and "with a turn that names no speaker" in unmarked


def test_an_alpaca_instruction_is_kept_where_it_differs_from_row_to_row(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Explain it to a child of {n}.", "input": "What is asthma?", "output": "Narrow airways."}
        for n in (5, 9)
    ]
    first, second = read(local(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert first[1]["content"] == "Explain it to a child of 5.\n\nWhat is asthma?"
    assert second[1]["content"].startswith("Explain it to a child of 9.")


def test_a_title_stands_in_for_a_missing_question(tmp_path: Path) -> None:
    rows = [{"Description": "Q. Is a cough bad?", "Patient": " ", "Doctor": "No, rest."}]
    rows += [{"Description": None, "Patient": None, "Doctor": None}]
    titled, empty = read(local(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert titled[1]["content"] == "Q. Is a cough bad?" and empty == "without an answer"


GOOD = said("I have a cough.", "Rest and drink.")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (GOOD[:1], "without an answer"),
        ([GOOD[0], {"role": "assistant", "content": "  "}], "without an answer"),
        ([GOOD[0], {"role": "assistant", "content": None}], "without an answer"),
        ([], "without an answer"),
        ([{"role": "nurse", "content": "Hello."}, GOOD[1]], "with the unknown speaker 'nurse'"),
        ([{"role": "user", "content": [{"image": "x"}]}, GOOD[1]], "whose user message is not text but a list"),
        ([GOOD[0], GOOD[0], GOOD[1]], "whose roles do not alternate"),
        ([GOOD[1]], "without a question"),
        ([{"role": "user", "content": ""}, GOOD[1]], "without a question"),
        ([{"role": "system", "content": ""}, *GOOD], "with an empty message"),
        ([{"role": "user", "content": "half a \ud83d"}, GOOD[1]], "with broken characters"),
        ("no list", "whose messages are no list"),
        (None, "whose messages are no list"),
    ],
)
def test_a_bad_row_says_why(tmp_path: Path, messages: object, reason: str) -> None:
    rows = [{"messages": GOOD}, {"messages": messages}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    good, bad = read(local(path))
    assert good[1:] == GOOD and reason in bad


def test_roles_in_capitals_and_instructions_that_are_lists(tmp_path: Path) -> None:
    messages = [m | {"role": m["role"].title()} for m in GOOD]
    (found,) = read(local(write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])))
    assert found[1:] == GOOD
    rows = [{"instruction": ["x"], "input": "Is it bad?", "output": "No."}] * 2
    assert "with a list in the column instruction" in read(local(write_jsonl(tmp_path / "alpaca.jsonl", rows)))[0]


def test_mixed_types_in_a_column_cost_their_rows(tmp_path: Path) -> None:
    rows = [{"question": "Is it bad?", "answer": value} for value in ("No.", 5, float("nan"), True, {"a": 1}, None)]
    text, number, nan, boolean, mapping, none = read(local(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert text[2]["content"] == "No."
    assert number == "with a number in the column answer, where text belongs"
    assert boolean.startswith("with true or false") and mapping.startswith("with an object")
    assert nan == none == "without an answer"


def test_broken_json_lines_cost_only_themselves(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", conversations(40))
    hostile = ["[1, 2]", '{"messages": ' + "9" * 5000 + "}", "[" * 100_000, '{"messages": "\\ud83d"}']
    path.write_text('{"messages": [\n' + path.read_text() + "\n".join(hostile), encoding="utf-8")
    prepared = prepare(local(path))
    rejects = [json.loads(line) for line in prepared.rejects.read_text().splitlines()]
    assert [(r["row"], r["reason"]) for r in rejects if r["rule"] == "unusable"] == [
        (1, "that cannot be parsed"),
        (42, "that are no {column: value} objects"),
        (43, "that cannot be parsed"),
        (44, "that cannot be parsed"),
        (45, "whose messages are no list of {role, content}"),
    ]
    assert prepared.report["unusable"]["that cannot be parsed (first: row 1)"] == 3


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("empty.jsonl", "", "the file is empty"),
        ("blank.jsonl", "\n\n", "no usable conversation: there are no rows"),
        ("rows.txt", "x", r"cannot read \.txt; it must end in \.json, \.jsonl, \.csv, \.tsv, \.parquet"),
        ("rows.json", "[{", "broken JSON in line 1"),
        ("rows.json", '[{"a": 1}\n {"a": 2}]', "broken JSON in line 2: after row 1 a comma or the end of the list"),
        ("rows.json", "{}", r"must hold a list of rows, .* with a row a line its name ends in \.jsonl"),
        ("rows.jsonl", '[{"a": 1},\n{"a": 2}]', r"one JSON list, not a row a line: rename it to \.json"),
        ("rows.parquet", "x", "not a Parquet file"),
        (
            "rows.jsonl",
            b'{"messages": "\xe9"}',
            r"not UTF-8 text \(byte 0xe9, perhaps Latin-1\): .*iconv -f LATIN1 -t UTF-8",
        ),
        (
            "rows.csv",
            "Patient,Doctor\r\nq,a\r\n".encode("utf-16"),
            "looks like UTF-16.: convert it with `iconv -f UTF-16",
        ),
        (
            "rows.jsonl",
            '{"complaint": "Is a long cough bad?", "reply": "No, it is not.", "n": 3}',
            r"the columns are complaint \(text\), reply \(text\), n \(a number\): "
            r"try data\.columns\.question=complaint data\.columns\.answer=reply",
        ),
        ("rows.csv", "only\nx\n", r"the columns are only \(text\): name one with data\.columns\.messages=COLUMN"),
        ("rows.csv", 'messages\n"never closed\n', "broken CSV near line 2: unexpected end"),
        ("rows.jsonl", '{"messages": []}\n' * 3, "no usable conversation: 3 without an answer"),
        (
            "rows.jsonl",
            json.dumps({"messages": GOOD}),
            "the (training|train|validation) split is empty: 1 conversations in 1 groups",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str, content: str | bytes, line: str) -> None:
    with pytest.raises(UserError, match=line) as refusal:
        prepare(local(write(tmp_path / name, content)))
    assert len(refusal.value.lines) == 1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.columns.messages=turns"], r"data\.columns\.messages=turns: there is no such column; the columns are"),
        (["data.columns.question=Patient", "data.columns.answer=Doctor"], "question=Patient: there is no such column"),
        (["data.format=alpaca"], r"neither messages nor question and answer|there is no column instruction"),
        (["data.format=sharegpt", "data.columns.group=case"], r"data\.columns\.group=case: there is no such column"),
    ],
)
def test_a_wrong_mapping_lists_the_columns(tmp_path: Path, overrides: list[str], line: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", conversations(40))
    with pytest.raises(UserError, match=line) as refusal:
        prepare(local(path, *overrides))
    assert "the columns are messages (a list), topic (text), group (text)" in str(refusal.value)


def test_semicolons_and_short_and_long_csv_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "Patient;Doctor\nIs it bad?;No, rest.\nIs it bad?\nIs it;bad;or not?\n")
    good, short, long = read(local(path))
    assert (good[1]["content"], good[2]["content"]) == ("Is it bad?", "No, rest.")
    assert short == "without an answer" and long == "that cannot be parsed"


def test_a_column_without_a_name_means_nothing(tmp_path: Path) -> None:
    """pandas writes its index so."""
    said = [[m["content"] for m in row["messages"]] for row in conversations(60)]
    lines = [f'{i},{q},"{a}"' for i, (q, a, *_) in enumerate(said)]
    found = prepare(local(write(tmp_path / "rows.csv", "\n".join([",Patient,Doctor", *lines])), "data.test_size=0.2"))
    assert set(found.report["by_source"]) == {"local"}
    assert all(c.group.startswith("question/") for c in found.train)


def test_a_column_that_tells_nothing_apart_is_no_group(tmp_path: Path) -> None:
    rows = [row | {"group": "all", "source": f"https://example.org/{i}"} for i, row in enumerate(conversations(60))]
    found = prepare(local(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert found.report["groups"] == 60 and set(found.report["by_source"]) == {"local"}


def test_a_file_that_goes_missing_is_one_line(tmp_path: Path) -> None:
    data = local(write(tmp_path / "rows.jsonl", "{}"))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="No such file or directory"):
        prepare(data)


def test_formats_are_all_covered() -> None:
    assert {name.split()[0] for name in ROWS} == {form.name for form in Format} - {"auto"}
