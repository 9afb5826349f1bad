"""Benchmark files or hub sets -> hashes of their questions' words, to keep them out of training.

A conversation that shares `size` words in a row with a benchmark question, or is one, would make the benchmark's score
meaningless (Brown et al. 2020, arXiv:2005.14165, appendix C).
"""

from collections.abc import Sequence
from pathlib import Path

from medtune.config.schema import Source, Speakers
from medtune.data.hashing import ngrams
from medtune.data.reading.formats import find_column, suggest_columns
from medtune.data.reading.normalize import normalized_words
from medtune.data.reading.sources import identity, read_rows
from medtune.runtime.errors import UserError


def source_of(name: str) -> Source:
    """Returns a benchmark's source: a file, or a hub set as owner/name@commit."""
    if Path(name).expanduser().is_file():
        return Source(name=name, path=name)
    hub_id, _, revision = name.partition("@")
    if hub_id.count("/") != 1 or "." in Path(hub_id).suffix:
        raise UserError(f"data.benchmarks: {name} is no file here, and no hub set (owner/name@commit)")
    return Source(name=name, path=None, hub_id=hub_id, revision=revision or None)


def ngram_fingerprints(names: Sequence[str]) -> list[str]:
    """Returns a name for the content of each benchmark."""
    return [identity(source_of(name), "data.benchmarks") for name in names]


def benchmark_ngrams(names: Sequence[str], size: int) -> frozenset[int]:
    """Hashes of every `size` words in a row of the benchmarks' questions.

    Raises `UserError` when a benchmark cannot be read or has no column of questions.
    """
    found: set[int] = set()
    for name in names:
        rows = [row for _, row in read_rows(source_of(name), "data.benchmarks", split=None) if isinstance(row, dict)]
        columns = list(dict.fromkeys(str(column) for row in rows for column in row))
        column = find_column("question", columns, rows, Speakers())
        if column is None:
            there_are = suggest_columns(columns, rows, "").partition(":")[0]
            raise UserError(f"data.benchmarks: {name} has no column of questions; {there_are}: rename one to question")
        for row in rows:
            found.update(ngrams(normalized_words(str(row.get(column) or "")), size))
    found.discard(ngrams([], size)[0])
    return frozenset(found)
