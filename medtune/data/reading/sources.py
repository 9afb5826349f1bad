"""A file or a hub set -> its rows as dictionaries, each with its row number."""

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medtune.config.schema import BUNDLED, Source
from medtune.data.reading.delimited import read_csv, require_different
from medtune.runtime.errors import UserError

Row = tuple[int, Any]  # number of the row, from 1 (of the line, in JSON lines), and what stands in it

SPACE = " \t\r\n"


def location(source: Source) -> str:
    """Returns what a source is read from, in the user's words: a file's path, or a hub id with its revision."""
    if source.path is not None:
        return source.path.removeprefix(BUNDLED)
    return f"{source.hub_id}@{source.revision[:7]}" if source.revision else str(source.hub_id)


def identity(source: Source, place: str) -> str:
    """Returns a name for the content of a source, that changes when the content does; `place` is its dotted key.

    Raises `UserError` when there is no such file or hub set.
    """
    if source.path is None:
        return f"{source.hub_id}@{source.revision or hub_set(source, place)._fingerprint}"
    try:
        with file_of(source).open("rb") as content:
            return file_of(source).suffix.lower() + hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{source.path}: {error.strerror or error}") from None


def read_rows(source: Source, place: str, split: str | None = "train") -> Iterator[Row]:
    """Reads a JSON, JSONL, CSV, TSV or Parquet file, or else a split of the hub set (None: every split).

    A row that cannot be parsed is yielded as the exception, so that one broken line costs only itself. Raises
    `UserError` when the file is missing, empty, unreadable or of another kind, and when the hub set cannot be had.
    """
    if source.path is None:
        yield from read_hub(source, place, split)
        return
    path = file_of(source)
    readers = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot read {path.suffix or 'this file'}; it must end in {', '.join(readers)}")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {in_other_encoding(path, error)}") from None


def expected_rows(source: Source, first: Sequence[Row]) -> int | None:
    """Returns about how many rows a file has, from the length of the `first`; None where that cannot be told."""
    texts = [str(row) for _, row in first]
    if source.path is None or file_of(source).suffix == ".parquet" or not texts:
        return None
    return max(len(texts), int(file_of(source).stat().st_size * len(texts) / sum(map(len, texts))))


def file_of(source: Source) -> Path:
    """Returns the file that holds a source."""
    if str(source.path).startswith(BUNDLED):
        return Path(__file__).parent.parent / str(source.path).removeprefix(BUNDLED)
    return Path(str(source.path)).expanduser()


def in_other_encoding(path: Path, error: UnicodeDecodeError) -> str:
    """Returns what to do with a file that is not UTF-8."""
    with path.open("rb") as content:
        start = content.read(4)
    utf_16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name = "UTF-16" if utf_16 else "LATIN1"
    seen = "looks like UTF-16" if utf_16 else f"byte 0x{error.object[error.start]:02x}, perhaps Latin-1"
    return f"not UTF-8 text ({seen}): convert it with `iconv -f {name} -t UTF-8`"


class RepeatedKey(ValueError):
    """A key that stands twice in one object, with different values: which of them is meant cannot be told."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. Raises `RepeatedKey`."""
    made = dict(pairs)
    if len(made) < len(pairs):
        for name, value in pairs:
            if made[name] != value:
                raise RepeatedKey(f"in which the key {name} stands twice")
    return made


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yields the rows of a file with a JSON object on each line."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if (number == 1 and line.strip() in ("[", "[{")) or line.startswith("[{"):
                raise UserError(f"{path}: one JSON list, not a row a line: rename it to .json")
            if line.strip():
                try:
                    yield number, json.loads(line, object_pairs_hook=unique_keys)
                except (ValueError, RecursionError) as error:  # broken, a number too long, or nested too deep
                    yield number, error


def read_json(path: Path) -> Iterator[Row]:
    """Yields the rows of a file that holds a JSON list, or several one after another, as files joined by `cat` do."""
    text = path.read_text(encoding="utf-8-sig")
    place = skip_space(text, 0)
    if text[place : place + 1] != "[":
        raise UserError(
            f"{path}: the file must hold a list of rows, as [{{…}}, {{…}}]; with a row a line its name ends in .jsonl"
        )
    number = 0
    while text[place : place + 1] == "[":
        for end, row in elements(text, place, number, path):
            if row is END:
                place = skip_space(text, end)
            else:
                number += 1
                yield number, row
    if place < len(text):
        line = text.count("\n", 0, place) + 1
        raise UserError(f"{path}: something follows the end of the list in line {line}: remove it, or make it a row")


END = object()  # stands for the end of a list


def elements(text: str, place: int, number: int, path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the elements of the list that begins at `place`, each with the place behind it, and then `END`.

    One by one: a list of all rows would take many times the memory of their text. `number`: rows before this list.
    Raises `UserError` where the JSON is broken.
    """
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    place = skip_space(text, place + 1)
    while text[place : place + 1] != "]":
        number += 1
        try:
            row, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: broken JSON in line {error.lineno} (row {number}): {error.msg}") from None
        except RepeatedKey as error:
            raise UserError(f"{path}: row {number}: an object {error}: keep one of the two") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: broken JSON in row {number}: {error}") from None
        yield place, row
        place = skip_space(text, place)
        if text[place : place + 1] == ",":
            place = skip_space(text, place + 1)
        elif text[place : place + 1] != "]":
            line = text.count("\n", 0, place) + 1
            raise UserError(
                f"{path}: broken JSON in line {line}: after row {number} a comma or the end of the list is due"
            )
    yield place + 1, END


def skip_space(text: str, place: int) -> int:
    """Returns the next place that is no white space."""
    while place < len(text) and text[place] in SPACE:
        place += 1
    return place


def read_parquet(path: Path) -> Iterator[Row]:
    """Yields the rows of a Parquet file."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        file, number = ParquetFile(path), 0
        require_different(file.schema_arrow.names, path)
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from None


def read_hub(source: Source, place: str, split: str | None) -> Iterator[Row]:
    """Yields the rows of a hub set."""
    number = 0
    for batch in hub_set(source, place, split).with_format("arrow").iter(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def hub_set(source: Source, place: str, split: str | None = "train") -> Any:
    """Returns a hub set, as `datasets` caches it; `split` None joins all. Raises `UserError` when it cannot be had."""
    import datasets
    from huggingface_hub import HfApi

    datasets.disable_progress_bars()
    here = cached_sets()
    try:
        if source.hub_id not in here and not Path(str(source.hub_id)).is_dir() and not datasets.config.HF_HUB_OFFLINE:
            # Once, with a short limit: loading would retry for a minute.
            HfApi().dataset_info(str(source.hub_id), revision=source.revision, timeout=10)
        found = datasets.load_dataset(str(source.hub_id), revision=source.revision, split=split)
        return datasets.concatenate_datasets(list(found.values())) if split is None else found
    except Exception as error:  # of datasets, of the hub's client, or of whichever HTTP library that uses
        known = f"cached here: {', '.join(here)}" if here else "no data set is cached here"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{location(source)} cannot be had from the Hugging Face Hub ({reason}); {known}; "
            f"download its file elsewhere and name it with {place}.path=FILE"
        ) from error


def cached_sets() -> list[str]:
    """Ids of the hub sets that `datasets` has in its cache."""
    import datasets

    folders = sorted(Path(datasets.config.HF_DATASETS_CACHE).glob("*___*"))
    return [folder.name.replace("___", "/", 1) for folder in folders]
