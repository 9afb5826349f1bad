"""A CSV or TSV file, by whatever program it was written -> its rows."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from medtune.runtime.errors import UserError

DELIMITERS = ",\t;|"
SAMPLE = 500  # rows by which the delimiter is told
WHOLE = 0.99  # share of the rows with a cell for each column, from which a way of reading is not doubted
FEWEST_WHOLE = 0.9  # and below which it is wrong

# How quotes are written: as RFC 4180 says; with a backslash before them (Spark, MySQL); as any other character.
# strict: otherwise an unclosed quote swallows the rows after it.
QUOTING: tuple[dict[str, Any], ...] = (
    {"strict": True},
    {"strict": True, "escapechar": "\\"},
    {"quoting": csv.QUOTE_NONE},
)


@dataclass
class Dialect:
    """How a file is written. `skipped`: lines before the header; `whole`: share of the rows that fit the header."""

    delimiter: str
    quoting: dict[str, Any]
    skipped: int
    whole: float = 0.0
    error: str | None = None


def read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the rows of a file as (number, {column: cell}); a row with too many cells as an exception.

    Raises `UserError` where no way of reading fits the file, or two columns have one name.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB cuts long consultations off with an error
    dialect = find_dialect(path)
    if dialect.error:
        raise UserError(
            f"{path}: broken CSV near {dialect.error}: write quotes within a cell twice, or save the rows as .jsonl"
        )
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = reader(lines, dialect)
        columns = column_names(next(rows, []), path)
        for number, cells in enumerate((cells for cells in rows if cells), 1):
            while len(cells) > len(columns) and not cells[-1]:
                del cells[-1]
            if len(cells) > len(columns):
                yield number, ValueError(f"{len(cells)} cells in {len(columns)} columns: {cells}")
            else:
                yield number, dict(zip(columns, cells, strict=False))


def column_names(header: list[str], path: Path) -> list[str]:
    """Returns the names of the columns, made up where a column has none."""
    names = [name if name.strip() else f"column {number}" for number, name in enumerate(header, 1)]
    require_different(names, path)
    return names


def require_different(names: Sequence[str], path: Path) -> None:
    """Raises `UserError` where two columns have one name: which of them is meant cannot be told."""
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"{path}: {times} columns are called {name}: rename or remove all but one")


def find_dialect(path: Path) -> Dialect:
    """Returns how a file is written: the first way of reading it that fits, else the one that fits best.

    The whole file is read for it: a quote that only one row in a million has would cost all rows after it.
    """
    with path.open(encoding="utf-8-sig", newline="") as lines:
        header = lines.readline()
        announced = header.strip().strip('"')
        skipped = int(announced.lower().startswith("sep=") and len(announced) == len("sep=;"))  # Excel
        if skipped:
            delimiters = announced[-1]
        elif path.suffix.lower() == ".tsv":
            delimiters = "\t"
        else:
            delimiters = "".join(mark for mark in DELIMITERS if mark in header) or ","
        tried: list[Dialect] = []
        for quoting in QUOTING:
            dialect = best_delimiter(lines, [Dialect(mark, quoting, skipped) for mark in delimiters])
            assess(lines, dialect, None)
            if dialect.error is None and dialect.whole >= WHOLE:
                return dialect
            tried.append(dialect)
    fitting = [dialect for dialect in tried if dialect.error is None and dialect.whole >= FEWEST_WHOLE]
    return max(fitting or tried[:1], key=lambda dialect: dialect.whole)


def best_delimiter(lines: TextIO, dialects: list[Dialect]) -> Dialect:
    """Returns the dialect in which most of the first rows have a cell for each column; of several the first."""
    for dialect in dialects if len(dialects) > 1 else []:
        assess(lines, dialect, SAMPLE)
    return max(dialects, key=lambda dialect: (dialect.error is None, dialect.whole))


def assess(lines: TextIO, dialect: Dialect, most: int | None) -> None:
    """Reads a file, or its first `most` rows, for how well a dialect fits it."""
    lines.seek(0)
    rows = reader(lines, dialect)
    found = whole = 0
    try:
        width = len(next(rows, []))
        for cells in islice((cells for cells in rows if cells), most):
            found += 1
            whole += len(cells) == width
    except csv.Error as error:
        dialect.error = f"line {rows.line_num + dialect.skipped}: {error}"
        return
    if width == 1 and dialect.quoting is QUOTING[-1]:
        dialect.error = "the start: one column, and quotes that do not close"  # any text can be read so
    dialect.whole = whole / max(found, 1) if found else 1.0


def reader(lines: TextIO, dialect: Dialect) -> Any:
    """Returns the rows of a file from its header on."""
    for _ in range(dialect.skipped):
        lines.readline()
    return csv.reader(lines, delimiter=dialect.delimiter, **dialect.quoting)
