"""Conversations on disk, mapped into memory when read: a set may be larger than the machine's memory."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from medtune.data.reading.turns import Messages


@dataclass
class Reject:
    """A row left out: its number, its source, the rule, why, and what stood in it."""

    row: int
    source: str
    rule: str
    reason: str
    content: Any


def write_rejects(file: Any, rejects: Sequence[Reject]) -> None:
    """Writes rejects as JSON lines, in ASCII: a rejected row may hold characters that UTF-8 cannot."""
    for reject in rejects:
        file.write(json.dumps(asdict(reject), default=str) + "\n")


SPLITS = ("train", "validation", "test")
SCHEMA = pa.schema({"row": pa.int64(), "source": pa.string(), "group": pa.string(), "messages": pa.string()})


@dataclass
class Conversation:
    """Messages {role, content}: system, then user and assistant in turn, the assistant last; content stripped.
    An answer of weight 0 is read and not trained on.

    `row` is its number in its source; conversations of one `group` are in one split.
    """

    row: int
    source: str
    group: str
    messages: Messages


class ConversationTable(Sequence[Conversation]):
    """The conversations of an Arrow file (https://arrow.apache.org/docs/format/Columnar.html)."""

    def __init__(self, path: Path) -> None:
        self.table = table(path)

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, place: int) -> Conversation: ...
    @overload
    def __getitem__(self, place: slice) -> list[Conversation]: ...
    def __getitem__(self, place: int | slice) -> Conversation | list[Conversation]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return conversation(self.table.slice(range(len(self))[place], 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Conversation]:
        for batch in self.table.to_batches():
            for row in batch.to_pylist():
                yield conversation(row)


def conversation(row: dict[str, Any]) -> Conversation:
    """Returns a conversation, from a row of an Arrow file, where messages are JSON."""
    return Conversation(row["row"], row["source"], row["group"], json.loads(row["messages"]))


def table(path: Path) -> pa.Table:
    """Returns the content of an Arrow file, mapped rather than read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def batch_of(rows: Sequence[tuple[Any, ...]], schema: pa.Schema = SCHEMA) -> pa.RecordBatch:
    """Returns rows, given as tuples in the order of the columns, as what a `Writer` takes."""
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


class Writer:
    """Writes an Arrow file batch by batch. Use as a context manager."""

    def __init__(self, path: Path, schema: pa.Schema = SCHEMA) -> None:
        self.schema = schema
        self.file = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_file(self.file, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends rows."""
        self.writer.write_batch(batch)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.close()
        self.file.close()


def weight_field(rows: ConversationTable) -> dict[str, pa.DataType]:
    """Returns the field of messages that are not to be trained on, where a set has some."""
    found = pc.match_substring(rows.table["messages"], '"weight": 0')  # a quote within a content is escaped
    return {"weight": pa.int8()} if pc.any(found).as_py() else {}


def write_parquet(rows: ConversationTable, path: Path) -> None:
    """Writes conversations as Parquet: messages as a list of {role, content}, source, group and row."""
    message = pa.struct({"role": pa.string(), "content": pa.string(), **weight_field(rows)})
    schema = pa.schema({"messages": pa.list_(message), "source": pa.string(), "group": pa.string(), "row": pa.int64()})
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in rows.table.to_batches():
            values = [{**row, "messages": json.loads(row["messages"])} for row in batch.to_pylist()]
            writer.write_batch(pa.RecordBatch.from_pylist(values, schema))
