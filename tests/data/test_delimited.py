"""CSV of any program is read; where it cannot be, one line says why."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medtune.data.reading.delimited import read_csv
from medtune.runtime.errors import UserError

WANTED = [{"question": 'He said "hi", so', "answer": "No, rest."}] * 3


def rows(path: Path, text: str) -> list[dict[str, str]]:
    path.write_bytes(text.encode())
    return [row for _, row in read_csv(path)]


@pytest.mark.parametrize(
    "text",
    [
        'question,answer\n' + '"He said ""hi"", so","No, rest."\n' * 3,
        'question,answer\n' + '"He said \\"hi\\", so","No, rest."\n' * 3,  # Spark, MySQL
        'sep=;\nquestion;answer\n' + '"He said ""hi"", so";"No, rest."\n' * 3,  # Excel
        '"sep=;"\nquestion;answer\n' + 'He said "hi", so;No, rest.\n' * 3,
        '\ufeffquestion;answer\r\n' + 'He said "hi", so;No, rest.\r\n' * 3,
        'question|answer\n' + 'He said "hi", so|No, rest.\n' * 3,
        'question,answer,,\n' + '"He said ""hi"", so","No, rest.",,\n' * 3,
    ],
)  # fmt: skip
def test_a_file_is_read_as_it_was_written(tmp_path: Path, text: str) -> None:
    found = [{name: cell for name, cell in row.items() if cell} for row in rows(tmp_path / "rows.csv", text)]
    assert found == WANTED


def test_quotes_that_do_not_quote_are_text(tmp_path: Path) -> None:
    text = "question\tanswer\n" + '"Hi" is what he said\tNo, rest.\n' * 3
    assert rows(tmp_path / "rows.tsv", text)[0] == {"question": '"Hi" is what he said', "answer": "No, rest."}


def test_a_comma_in_the_header_is_no_delimiter(tmp_path: Path) -> None:
    text = "question;answer, by a doctor\n" + "Is it bad?;No.\n" * 3
    assert rows(tmp_path / "rows.csv", text)[0] == {"question": "Is it bad?", "answer, by a doctor": "No."}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("question,answer,answer\na,b,c\n", "2 columns are called answer: rename"),
        ('messages\n"never closed\n', "broken CSV near line 2"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        rows(tmp_path / "rows.csv", text)


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)


@settings(max_examples=2_000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5), st.sampled_from(",;|\t"))
def test_what_csv_writes_reads_back(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple], delimiter: str
) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("question", "answer", "id"), *table])
    path = tmp_path_factory.getbasetemp() / ("rows.tsv" if delimiter == "\t" else "rows.csv")
    found = rows(path, file.getvalue())
    assert [tuple(row.values()) for row in found] == table
