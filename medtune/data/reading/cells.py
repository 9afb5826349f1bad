"""The value of a cell, whatever program wrote it: lists as text, words for nothing, text in parts."""

import ast
import json
import math
from typing import Any

# What programs write where there is nothing: pandas, R, Excel, MySQL, and the makers of Alpaca's sets.
NOTHING = frozenset((
    "", "nan", "n/a", "na", "#n/a", "<na>", "null", "none", "nil", "\\n", "-", "--", "<noinput>", "noinput", "no input",
))  # fmt: skip
LONGEST_WORD = max(map(len, NOTHING))
LONGEST_LITERAL = 1_000_000  # characters; Python's own parser takes hundreds of times the memory of the text


def is_empty(value: Any) -> bool:
    """Returns whether a cell holds nothing: none of its kinds, or a word that stands for a missing value."""
    if isinstance(value, str):
        return len(value) < 2 * LONGEST_WORD and value.strip().lower() in NOTHING
    if isinstance(value, float):
        return math.isnan(value)  # pandas writes NaN
    return value is None or (isinstance(value, list | dict | tuple) and not value)


def parsed(value: Any) -> Any:
    """Returns the list that stands in a cell: as it is, as JSON, as Python's text for it (pandas writes such), or as
    an object of lists of equal length, {role: [...], content: [...]}. Any other value stays as it is.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = literal(value)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return value


def literal(text: str) -> Any:
    """Returns the list or object that a text is, in JSON or in Python; the text itself where it is neither."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if len(text) > LONGEST_LITERAL or not text.rstrip().endswith(("]", "}")):
            return text
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
    return found if isinstance(found, list | dict) else text


def plain_text(value: Any) -> str | None:
    """Returns the text of a message: text, or a list of texts or of parts {type: text, text: …}; None for another
    value.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and value.keys() <= {"type", "text"} and value.get("type", "text") == "text":
        return plain_text(value.get("text"))
    if isinstance(value, list) and value:
        parts = [plain_text(part) for part in value]
        return None if None in parts else "\n".join(part for part in parts if part)
    return None


def kind_of(value: Any) -> str:
    """Returns the kind of a value in plain words."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bool):
        return "true or false"
    return "text" if isinstance(value, str) else "a number"
