"""A file -> its rows as dictionaries, each with its row number."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medtune.config import Refusal

Row = tuple[int, Any]  # number of the row, from 1 (of the line, in JSON lines), and what stands in it


def read_rows(path: Path) -> Iterator[Row]:
    """Read a JSON, JSONL, CSV or Parquet file.

    A row that cannot be parsed is yielded as the exception, so that one broken line costs only itself. Raises `Refusal`
    when the file is missing, empty, unreadable or of another kind.
    """
    readers = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise Refusal(f"data.path={path}: cannot read {path.suffix or 'a folder'}; it must end in {', '.join(readers)}")
    try:
        if path.stat().st_size == 0:
            raise Refusal(f"data.path={path}: the file is empty")
        yield from reader(path)
    except OSError as error:
        raise Refusal(f"data.path={path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise Refusal(f"data.path={path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:  # broken, a number too long, or nested too deep
                    yield number, error


def read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise Refusal(f"data.path={path}: broken JSON in line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"data.path={path}: broken JSON: {error}") from None
    if not isinstance(rows, list):
        raise Refusal(f"data.path={path}: the file must hold a list of rows, as [{{…}}, {{…}}]")
    yield from enumerate(rows, 1)


def read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB cuts long consultations off with an error
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)  # otherwise an unclosed quote swallows the rows after it
        try:
            yield from enumerate(rows, 1)
        except csv.Error as error:
            raise Refusal(f"data.path={path}: broken CSV near line {rows.line_num}: {error}") from None


def read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except ArrowInvalid as error:
        raise Refusal(f"data.path={path}: not a Parquet file ({error})") from None
