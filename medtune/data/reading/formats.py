"""The first rows of a source -> how its rows hold a conversation; a `UserError` that says what would work otherwise."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medtune.config.enums import Format
from medtune.config.schema import Source
from medtune.data.reading.sources import Row
from medtune.runtime.errors import UserError

# Names under which the public sets have their columns, in lower case; the first that a row has is taken.
USUAL = {
    "messages": ("messages", "conversations", "conversation", "chat", "utterances", "dialogue", "turns", "text"),
    "question": ("patient", "question", "query", "prompt", "input", "instruction"),
    "answer": ("doctor", "answer", "response", "completion", "output", "reply", "answer_icliniq"),
    "title": ("description",),
    "group": ("group", "patient_id", "case_id", "conversation_id", "dialogue_id", "document_id"),
    "source": ("source",),
}  # fmt: skip
MOST_SOURCES = 50
TEXTS = {"question", "answer"}
IN_ONE_COLUMN = (Format.messages, Format.sharegpt, Format.turns)
SPEAKER = re.compile(r"^\s*(patient|doctor)\s*:", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class RowFormat:
    """Format of the rows, and which column holds what; `instruction` is the one that all Alpaca rows share.

    Formats: a list of {role, content} (messages) or of {from, value} (ShareGPT,
    https://github.com/lm-sys/FastChat), prompt and completion as text or messages
    (https://huggingface.co/docs/trl/dataset_formats), Alpaca's instruction, input and output
    (https://github.com/tatsu-lab/stanford_alpaca), a question and an answer column, or a dialogue whose turns begin
    with 'patient:' and 'doctor:', as in MedDialog (arXiv:2004.03329).
    """

    format: Format
    columns: dict[str, str]
    instruction: str | None = None

    def __str__(self) -> str:
        named = ", ".join(f"{part}: {column}" for part, column in self.columns.items())
        return f"{self.format.name} ({named})"


def detect_format(first: Sequence[Row], source: Source, place: str) -> RowFormat:
    """Recognises how rows hold conversations, or checks the format and columns that the configuration names.

    `first`: rows from the beginning; `place`: the source's dotted key. Raises `UserError`, listing the columns there
    are and the mapping that would work.
    """
    rows = [row for _, row in first if isinstance(row, dict)]
    found = list(dict.fromkeys(str(name) for row in rows for name in row))
    if not found:
        return RowFormat(Format.messages, {"messages": "messages"})  # every row is rejected for what it is
    named = {part: column for part, column in asdict(source.columns).items() if column}
    for part, column in named.items():
        if column not in found:
            raise UserError(
                f"{place}.columns.{part}={column}: there is no such column; {suggest_columns(found, rows, place)}"
            )
    usual = {part: column for part in USUAL if (column := find_column(part, found, rows))}
    texts = text_columns(source.format, named, usual)
    if not texts:
        raise UserError(
            f"{place}: neither messages nor question and answer were recognised; {suggest_columns(found, rows, place)}"
        )
    parts = ("group", "source") if "messages" in texts else ("title", "group", "source")
    columns = texts | {part: (usual | named)[part] for part in parts if part in usual | named}
    chosen = format_of(texts, rows, found) if source.format is Format.auto else source.format
    if chosen is not Format.alpaca:
        return RowFormat(chosen, columns)
    if "instruction" not in found:
        raise UserError(f"{place}.format=alpaca: there is no column instruction; {suggest_columns(found, rows, place)}")
    instructions = {str(row.get("instruction")) for row in rows}
    shared = instructions.pop() if len(instructions) == 1 and len(rows) > 1 and columns["question"] == "input" else None
    return RowFormat(chosen, columns | {"instruction": "instruction"}, shared)


def text_columns(form: Format, named: dict[str, str], usual: dict[str, str]) -> dict[str, str]:
    """Returns the column of messages, or those of question and answer; none where neither can be told."""
    if (form not in IN_ONE_COLUMN and form is not Format.auto) or named.keys() & TEXTS:
        texts = {part: column for part, column in (usual | named).items() if part in TEXTS}
        if "messages" in named:
            return {"messages": named["messages"]}
        return texts if texts.keys() == TEXTS else {}
    if "messages" in usual | named:
        return {"messages": (usual | named)["messages"]}
    texts = {part: usual[part] for part in usual if part in TEXTS}
    return texts if texts.keys() == TEXTS and form is Format.auto else {}


def format_of(texts: dict[str, str], rows: Sequence[dict], found: Sequence[str]) -> Format:
    """Returns the format that columns and values speak for."""
    if "messages" in texts:
        value = parsed(next((row[texts["messages"]] for row in rows if row.get(texts["messages"])), None))
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            return Format.sharegpt if any("from" in turn for turn in value) else Format.messages
        return Format.turns if value else Format.messages
    if {"instruction", "output"} <= set(found):
        return Format.alpaca
    return Format.prompt_completion if {"prompt", "completion"} <= set(found) else Format.question_answer


def find_column(part: str, found: Sequence[str], rows: Sequence[dict]) -> str | None:
    """Returns the column that has one of a part's usual names, and the kind of value that goes with it."""
    lower = {name.strip().lower(): name for name in reversed(found)}
    columns = [lower[name] for name in USUAL[part] if name in lower]
    tests = {"messages": holds_turns, "source": tells_few_apart, "group": tells_apart}
    fits = tests.get(part, lambda column, rows: True)
    return next((column for column in columns if fits(column, rows)), None)


def holds_turns(column: str, rows: Sequence[dict]) -> bool:
    """Returns whether a column holds lists, or dialogues as text; an empty one might."""
    values = [parsed(value) for row in rows if (value := row.get(column))]
    return not values or any(isinstance(v, list) or (isinstance(v, str) and SPEAKER.search(v)) for v in values)


def tells_few_apart(column: str, rows: Sequence[dict]) -> bool:
    """Returns whether a column has few values: a link or a title for every row is no source to stratify by."""
    return len({str(row.get(column)) for row in rows}) <= MOST_SOURCES


def tells_apart(column: str, rows: Sequence[dict]) -> bool:
    """Returns whether a column has different values: one group would hold everything otherwise."""
    return len(rows) == 1 or len({str(row.get(column)) for row in rows}) > 1


def parsed(value: Any) -> Any:
    """Returns a list that stands as JSON in a CSV cell, else the value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def suggest_columns(found: Sequence[str], rows: Sequence[dict], place: str) -> str:
    """Returns the columns of a source with the kind of value in each, and the mapping that would probably work."""
    shown = []
    lengths = {}
    for column in found:
        values = [row[column] for row in rows if row.get(column) not in (None, "")]
        shown.append(f"{column} ({kind_of(values[0]) if values else 'empty'})")
        texts = [value for value in values if isinstance(value, str)]
        if texts:
            lengths[column] = sum(map(len, texts)) / len(texts)
    lists = [column for column in found if any(isinstance(row.get(column), list) for row in rows)]
    if lists:
        hint = f"try data=local, or {place}.format=auto with {place}.columns.messages={lists[0]}"
        return f"the columns are {', '.join(shown)}: {hint}"
    longest = sorted(lengths, key=lambda column: lengths[column])[-2:]
    if len(longest) < 2:
        hint = f"name one with {place}.columns.messages=COLUMN, or two with …question=COLUMN and …answer=COLUMN"
    else:  # a question usually stands before its answer
        question, answer = (column for column in found if column in longest)
        hint = f"try {place}.columns.question={quoted(question)} {place}.columns.answer={quoted(answer)}"
    return f"the columns are {', '.join(shown)}: {hint}"


def quoted(column: str) -> str:
    """Returns a column's name as it can be typed in a shell."""
    return column if re.fullmatch(r"[\w.-]+", column) else f"\"'{column}'\""


def kind_of(value: Any) -> str:
    """Returns the kind of a value in plain words."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bool):
        return "true or false"
    return "text" if isinstance(value, str) else "a number"
