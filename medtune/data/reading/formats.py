"""The first rows of a source -> how its rows hold a conversation; a `UserError` that says what would work otherwise."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from medtune.config.enums import Format
from medtune.config.schema import Source, Speakers
from medtune.data.reading.cells import is_empty, kind_of, parsed, plain_text
from medtune.data.reading.sources import Row
from medtune.data.reading.speakers import is_dialogue
from medtune.runtime.errors import UserError

# Names under which the public sets have their columns, in lower case; the first that a row has is taken.
USUAL = {
    "messages": (
        "messages", "conversations", "conversation", "chat", "utterances", "dialogue", "dialog", "turns", "text",
        "chosen",
    ),
    "question": ("patient", "question", "query", "prompt", "input", "instruction"),
    "answer": ("doctor", "answer", "response", "completion", "output", "reply", "answer_icliniq", "chosen"),
    "title": ("description",),
    "group": ("group", "patient_id", "case_id", "conversation_id", "dialogue_id", "document_id"),
    "source": ("source",),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "context": ("context", "passage"),
    "split": ("split", "partition", "subset"),
}  # fmt: skip
MOST_SOURCES = 50
TEXTS = {"question", "answer"}
IN_ONE_COLUMN = (Format.messages, Format.sharegpt, Format.turns)
FEWEST_WORDS = 3  # of a system message; "Cardiovascular" in a column called system is none

# How sets call their splits: train, validation or test.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn", "tr"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "devel", "development"), "validation"),
    **dict.fromkeys(("test", "tst", "testing", "eval", "evaluation", "held_out", "held-out", "holdout"), "test"),
}  # fmt: skip
# Columns that say whether a row may be trained on, where their values say so.
YES_OR_NO = ("train", "training", "trainable")
DESIRABLE = ("label", "kto_tag")  # of answers that people rated: https://huggingface.co/docs/trl/dataset_formats
WEIGHTS = ("weight",)


@dataclass(frozen=True)
class RowFormat:
    """Format of the rows, and which column holds what; `instruction` is the one that all Alpaca rows share.

    Formats: a list of {role, content} (messages) or of {from, value} (ShareGPT,
    https://github.com/lm-sys/FastChat), prompt and completion as text or messages
    (https://huggingface.co/docs/trl/dataset_formats), Alpaca's instruction, input and output
    (https://github.com/tatsu-lab/stanford_alpaca), a question and an answer column, or a dialogue whose turns begin
    with the name of who speaks, as in MedDialog (arXiv:2004.03329).

    `flags`: columns that may forbid to train on a row. `speakers`: who speaks under labels that only the user knows.
    """

    format: Format
    columns: dict[str, str]
    instruction: str | None = None
    flags: tuple[str, ...] = ()
    speakers: Speakers = field(default_factory=Speakers)

    @cached_property
    def used(self) -> frozenset[str]:
        """The columns that say something to medtune."""
        shared = {self.columns["instruction"]} if self.instruction is not None else set()
        return frozenset((*self.columns.values(), *self.flags)) - shared

    def __str__(self) -> str:
        named = ", ".join(f"{part}: {column}" for part, column in self.columns.items())
        flags = "".join(f", may forbid training: {column}" for column in self.flags)
        return f"{self.format.name} ({named}{flags})"


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
    usual = {part: column for part in USUAL if (column := find_column(part, found, rows, source.speakers))}
    if usual.get("messages", "").lower() == "chosen" and "question" in usual:
        del usual["messages"]  # it is the answer, or the whole conversation once more
    texts = text_columns(source.format, named, usual)
    if not texts:
        raise UserError(
            f"{place}: neither messages nor question and answer were recognised; {suggest_columns(found, rows, place)}"
        )
    columns = texts | other_columns(texts, usual | named)
    flags = tuple(column for column in found if column not in columns.values() and may_forbid(column, rows))
    chosen = format_of(texts, rows, found) if source.format is Format.auto else source.format
    if chosen is not Format.alpaca:
        return RowFormat(chosen, columns, None, flags, source.speakers)
    if "instruction" not in found:
        raise UserError(f"{place}.format=alpaca: there is no column instruction; {suggest_columns(found, rows, place)}")
    instructions = {str(row.get("instruction")) for row in rows}
    shared = instructions.pop() if len(instructions) == 1 and len(rows) > 1 and columns["question"] == "input" else None
    return RowFormat(chosen, columns | {"instruction": "instruction"}, shared, flags, source.speakers)


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


def other_columns(texts: dict[str, str], known: dict[str, str]) -> dict[str, str]:
    """Returns the columns beside the texts that say something: what was said before, who it is for, where it goes."""
    parts = ["group", "source", "system", "history", "context", "split"]
    if "messages" not in texts:
        parts.insert(0, "title")
    columns = {part: known[part] for part in parts if part in known and known[part] not in texts.values()}
    if "messages" in texts and known.get("answer", "").lower() == "chosen" != texts["messages"]:
        columns["answer"] = known["answer"]  # the answer to a conversation that ends with a question
    return columns


def format_of(texts: dict[str, str], rows: Sequence[dict], found: Sequence[str]) -> Format:
    """Returns the format that columns and values speak for."""
    if "messages" in texts:
        value = parsed(next((row[texts["messages"]] for row in rows if not is_empty(row.get(texts["messages"]))), None))
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            return Format.sharegpt if any("from" in turn for turn in value) else Format.messages
        return Format.turns if value else Format.messages
    if "instruction" in found and texts["question"] in ("instruction", "input"):
        return Format.alpaca
    return Format.prompt_completion if texts["question"] == "prompt" else Format.question_answer


def find_column(part: str, found: Sequence[str], rows: Sequence[dict], speakers: Speakers) -> str | None:
    """Returns the column that has one of a part's usual names, and the kind of value that goes with it."""
    lower = {name.strip().lower(): name for name in reversed(found)}
    columns = [lower[name] for name in USUAL[part] if name in lower]
    tests = {
        "messages": lambda column, rows: holds_turns(column, rows, speakers),
        "source": tells_few_apart,
        "group": tells_apart,
        "system": holds_prose,
        "context": holds_text,
        "split": names_splits,
    }
    fits = tests.get(part, lambda column, rows: True)
    return next((column for column in columns if fits(column, rows)), None)


def values_in(column: str, rows: Sequence[dict]) -> list[Any]:
    """Returns what stands in a column, empty cells left out."""
    return [value for row in rows if not is_empty(value := row.get(column))]


def holds_turns(column: str, rows: Sequence[dict], speakers: Speakers) -> bool:
    """Returns whether a column holds lists of turns, or dialogues as text; an empty one might."""
    values = [parsed(value) for value in values_in(column, rows)]
    texts = (value for value in values if isinstance(value, str))
    return not values or any(isinstance(v, list) for v in values) or any(is_dialogue(text, speakers) for text in texts)


def tells_few_apart(column: str, rows: Sequence[dict]) -> bool:
    """Returns whether a column has few values: a link or a title for every row is no source to stratify by."""
    return len({str(row.get(column)) for row in rows}) <= MOST_SOURCES


def tells_apart(column: str, rows: Sequence[dict]) -> bool:
    """Returns whether a column has different values: one group would hold everything otherwise."""
    return len(rows) == 1 or len({str(row.get(column)) for row in rows}) > 1


def holds_prose(column: str, rows: Sequence[dict]) -> bool:
    """Returns whether a column holds sentences rather than names."""
    values = values_in(column, rows)
    words = [len(value.split()) for value in values if isinstance(value, str)]
    longer = any(len(value) > 20 and not value.isascii() for value in values if isinstance(value, str))  # 中文
    return bool(words) and (sum(words) >= FEWEST_WORDS * len(words) or longer)


def holds_text(column: str, rows: Sequence[dict]) -> bool:
    """Returns whether a column holds text that a question can be about."""
    return any(plain_text(parsed(value)) for value in values_in(column, rows))


def names_splits(column: str, rows: Sequence[dict]) -> bool:
    """Returns whether a column holds nothing but names of splits."""
    values = {str(value).strip().lower() for value in values_in(column, rows)}
    return bool(values) and values <= SPLIT_NAMES.keys()


def may_forbid(column: str, rows: Sequence[dict]) -> bool:
    """Returns whether a column says of each row whether it may be trained on: by yes or no, or a weight of 0 to 1."""
    name, values = column.strip().lower(), values_in(column, rows)
    if not values:
        return False
    if name in DESIRABLE:
        return all(isinstance(truth(value), bool) for value in values)
    if name in YES_OR_NO:
        return all(truth(value) in (True, False) for value in values)
    return name in WEIGHTS and all(isinstance(truth(v), int | float) and 0 <= truth(v) <= 1 for v in values)


def truth(value: Any) -> Any:
    """Returns yes, no or a number, as the value of a flag or the text of one; None for anything else."""
    if isinstance(value, str):
        words = {"true": True, "false": False, "yes": True, "no": False}
        try:
            return words[value.strip().lower()] if value.strip().lower() in words else float(value)
        except ValueError:
            return None
    return value if isinstance(value, bool | int | float) else None


def suggest_columns(found: Sequence[str], rows: Sequence[dict], place: str) -> str:
    """Returns the columns of a source with the kind of value in each, and the mapping that would probably work."""
    shown = []
    lengths = {}
    for column in found:
        values = values_in(column, rows)
        shown.append(f"{column} ({kind_of(values[0]) if values else 'empty'})")
        texts = [value for value in values if isinstance(value, str)]
        if texts:
            lengths[column] = sum(map(len, texts)) / len(texts)
    lists = [column for column in found if any(isinstance(parsed(row.get(column)), list) for row in rows)]
    if lists:
        hint = f"try data=local, or {place}.format=auto with {place}.columns.messages={quoted(lists[0])}"
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
