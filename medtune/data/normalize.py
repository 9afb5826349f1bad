"""Rows of any mapped layout -> conversations of checked messages; a row that cannot be one becomes a reject."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from medtune.config import Columns, Refusal
from medtune.data.source import Row

ROLES = ("system", "user", "assistant")


@dataclass
class Conversation:
    """Messages {role, content}: system, then user and assistant in turn, the assistant last; content stripped.

    `row` is its number in the file.
    """

    row: int
    messages: list[dict[str, str]]
    group: str


@dataclass
class Reject:
    """A row left out: its number in the file, why, and what stood in it."""

    row: int
    reason: str
    content: Any


class Unusable(Exception):
    """Why a row cannot be a conversation."""


def normalize(rows: Iterable[Row], columns: Columns, system_prompt: str) -> tuple[list[Conversation], list[Reject]]:
    """Turn rows into conversations, each beginning with a system message.

    The system message is always explicit, because some chat templates slip in one of their own where it is missing.
    Raises `Refusal` when a mapped column is in no row.
    """
    conversations, rejects = [], []
    found: dict[str, None] = {}  # column names in order of appearance
    for number, row in rows:
        try:
            if not isinstance(row, dict):
                broken = isinstance(row, Exception)
                raise Unusable("of broken JSON" if broken else "that are no {column: value} objects")
            found |= dict.fromkeys(map(str, row))
            messages = checked(messages_of(row, columns))
        except Unusable as unusable:
            content = str(row) if isinstance(row, Exception) else row
            rejects.append(Reject(number, str(unusable), content))
            continue
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt.strip()})
        group = row.get(columns.group) if columns.group else None
        group = question_id(messages) if group is None else str(group)
        conversations.append(Conversation(number, messages, group))
    if found:
        require_columns(list(found), columns)
    return conversations, rejects


def require_columns(found: list[str], columns: Columns) -> None:
    """Raises `Refusal` when a mapped column is in no row: the mapping is wrong, not the rows."""
    for name, column in asdict(columns).items():
        if column and column not in found:
            hint = f"data.columns.{name}=COLUMN"
            if name == "messages":
                hint += ", or data.columns.messages=null data.columns.question=COLUMN data.columns.answer=COLUMN"
            if len(found) == 1 and (mark := next((m for m in ";\t|" if m in found[0]), None)):
                hint = f"save the file with commas between the columns, not {mark!r}"
            raise Refusal(
                f"data.columns.{name}={column}: the file has no such column, it has {', '.join(found)}: {hint}"
            )


def messages_of(row: dict[str, Any], columns: Columns) -> Any:
    """The raw messages of a row: its list, or its question and answer."""
    if columns.question is None or columns.answer is None:
        messages = row.get(str(columns.messages))
        if isinstance(messages, str):  # a CSV cell
            try:
                return json.loads(messages)
            except (ValueError, RecursionError):
                raise Unusable("whose messages are no list of {role, content}") from None
        return messages
    return [
        {"role": "user", "content": row.get(columns.question)},
        {"role": "assistant", "content": row.get(columns.answer)},
    ]


def checked(messages: Any) -> list[dict[str, str]]:
    """The messages with their contents stripped. Raises `Unusable` with the reason, worded to follow '3 rows …'."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Unusable("whose messages are no list of {role, content}")
    unknown = sorted({str(m.get("role")) for m in messages} - set(ROLES))
    if unknown:
        raise Unusable(f"with the unknown role {unknown[0]!r} (known: {', '.join(ROLES)})")
    for m in messages:
        if m.get("content") is not None and not isinstance(m["content"], str):
            raise Unusable(f"whose {m['role']} message is not text")
    clean = [{"role": m["role"], "content": (m.get("content") or "").strip()} for m in messages]
    if any("\ud800" <= character <= "\udfff" for m in clean for character in m["content"]):
        raise Unusable("with broken characters (half of a surrogate pair)")
    turns = clean[1:] if clean and clean[0]["role"] == "system" else clean
    if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
        raise Unusable("without an answer")
    if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise Unusable("whose roles do not alternate user, assistant")
    if not all(m["content"] for m in clean):
        raise Unusable("with an empty message")
    return clean


def question_id(messages: list[dict[str, str]]) -> str:
    """The group of a row that names none: rows that begin with the same question must share a split."""
    question = next(m["content"] for m in messages if m["role"] == "user")
    return hashlib.sha256(" ".join(question.lower().split()).encode()).hexdigest()[:16]
