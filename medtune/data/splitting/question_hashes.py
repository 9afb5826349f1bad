"""What conversations ask -> numbers, by which a trained adapter knows later what it has seen, without the text."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from medtune.data.hashing import hash_words
from medtune.data.reading.normalize import normalized_words, question_of
from medtune.data.reading.turns import Messages
from medtune.data.store import ConversationTable
from medtune.runtime.errors import UserError


def question_key(messages: Messages) -> int:
    """Returns a conversation's question by its words alone, as a number of 64 bits."""
    return hash_words(normalized_words(question_of(messages)))


def write_questions(seen: Iterable[ConversationTable], path: Path) -> None:
    """Writes the key of each conversation's question."""
    keys = pa.array([question_key(row.messages) for rows in seen for row in rows], pa.uint64())
    parquet.write_table(pa.table({"question": keys}), path)


def read_questions(path: Path) -> frozenset[int]:
    """Returns what `write_questions` wrote. Raises `UserError` if it is not there any more."""
    try:
        return frozenset(parquet.read_table(path)["question"].to_pylist())
    except (OSError, pa.ArrowException, KeyError):
        raise UserError(f"{path} is missing or damaged: without it nobody knows what was trained on") from None
