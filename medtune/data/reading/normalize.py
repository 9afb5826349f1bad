"""A row of a known layout -> checked messages; a row that cannot be a conversation says why."""

import math
import re
from typing import Any

from medtune.config.enums import Format
from medtune.data.reading.formats import SPEAKER, RowFormat, kind_of, parsed

ROLES = {
    "system": "system",
    "user": "user", "human": "user", "patient": "user",
    "assistant": "assistant", "gpt": "assistant", "doctor": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
# A run of letters and digits; in Chinese and Japanese, which put no spaces, a character.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
ASCII_WORD = re.compile(r"[a-z0-9_]+")  # the same in most texts, in half the time
ENOUGH_WORDS = 8  # a first message below it ("Hi doctor") does not tell one patient from another

Messages = list[dict[str, str]]


class RejectRow(Exception):
    """Why a row is left out, worded to follow '3 rows …', and by which rule."""

    def __init__(self, reason: str, rule: str = "unusable") -> None:
        super().__init__(reason)
        self.rule = rule


def normalize(row: Any, layout: RowFormat, system_prompt: str) -> Messages:
    """Messages {role, content} of a row: system, then user and assistant in turn, the assistant last.

    Contents are stripped. The system message is always explicit, because some chat templates slip in one of their own
    where it is missing. Raises `Unusable`.
    """
    if not isinstance(row, dict):
        raise RejectRow(
            "that cannot be parsed" if isinstance(row, Exception) else "that are no {column: value} objects"
        )
    messages = validate_messages(raw_messages(row, layout))
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt.strip()})
    return messages


def raw_messages(row: dict[str, Any], layout: RowFormat) -> Any:
    """Returns what a row says, as a list of {role, content} with the row's own contents."""
    columns = layout.columns
    if "messages" in columns:
        value = parsed(row.get(columns["messages"]))
        if layout.format is Format.turns:
            return dialogue(value)
        if layout.format is Format.sharegpt and isinstance(value, list):
            return [{"role": t.get("from"), "content": t.get("value")} if isinstance(t, dict) else t for t in value]
        return value
    question, answer = (text_or_list(row, columns[part]) for part in ("question", "answer"))
    if layout.format is Format.prompt_completion:
        asked = question if isinstance(question, list) else [{"role": "user", "content": question}]
        return asked + (answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])
    if layout.format is Format.alpaca:
        instruction = text_or_list(row, columns["instruction"])
        if isinstance(instruction, list):
            raise RejectRow(f"with a list in the column {columns['instruction']}, where text belongs")
        if instruction != layout.instruction and columns["question"] != columns["instruction"]:
            question = f"{instruction or ''}\n\n{question or ''}".strip()
    elif not question and "title" in columns:
        question = text_or_list(row, columns["title"])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def text_or_list(row: dict[str, Any], column: str) -> Any:
    """Returns a cell; None where it is empty or missing (pandas writes NaN). Raises `Unusable` for a number and the
    like.
    """
    value = parsed(row.get(column))
    if (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    ):
        return None
    if not isinstance(value, str | list):
        raise RejectRow(f"with {kind_of(value)} in the column {column}, where text belongs")
    return value


def dialogue(value: Any) -> Messages:
    """Turns that begin with 'patient:' or 'doctor:', as a list or as one text; turns of one speaker in a row join."""
    if isinstance(value, list):
        value = "\n".join(map(str, value))
    if not isinstance(value, str) or not SPEAKER.search(value):
        raise RejectRow("without turns that begin with 'patient:' or 'doctor:'")
    pieces = SPEAKER.split(value)[1:]  # speaker, words, speaker, words, …
    messages: Messages = []
    for speaker, words in zip(pieces[::2], pieces[1::2], strict=True):
        role = ROLES[speaker.lower()]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + words.strip()
        else:
            messages.append({"role": role, "content": words.strip()})
    return messages


def validate_messages(messages: Any) -> Messages:
    """Returns the messages with standard roles and stripped contents; what a patient says after the last answer is left
    out.

    Raises `Unusable`.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RejectRow("whose messages are no list of {role, content}")
    messages = [m | {"role": str(m.get("role")).lower()} for m in messages]
    unknown = sorted({m["role"] for m in messages} - ROLES.keys())
    if unknown:  # cut short: where role and content are swapped, it is what a patient wrote
        raise RejectRow(f"with the unknown role {unknown[0][:12]!r} (known: {', '.join(ROLES)})")
    for m in messages:
        if m.get("content") is not None and not isinstance(m["content"], str):
            raise RejectRow(f"whose {m['role']} message is not text but {kind_of(m['content'])}")
    clean = [{"role": ROLES[m["role"]], "content": (m.get("content") or "").strip()} for m in messages]
    if any(not m["content"].isascii() and broken(m["content"]) for m in clean):
        raise RejectRow("with broken characters (half of a surrogate pair)")
    if clean and clean[-1]["role"] == "user":
        del clean[-1]
    turns = clean[1:] if clean and clean[0]["role"] == "system" else clean
    if not turns or not turns[-1]["content"]:
        raise RejectRow("without an answer")
    if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise RejectRow("whose roles do not alternate user, assistant")
    if not all(m["content"] for m in turns if m["role"] == "user"):
        raise RejectRow("without a question")
    if not all(m["content"] for m in clean):
        raise RejectRow("with an empty message")
    return clean


def broken(text: str) -> bool:
    """Returns whether a text holds half of a surrogate pair, which no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def question_of(messages: Messages) -> str:
    """Returns what a conversation is about: its first question, with the next ones as long as that is only a
    greeting.
    """
    asked = ""
    for message in messages:
        if message["role"] == "user":
            asked = f"{asked}\n{message['content']}".strip()
            if len(asked.split()) >= ENOUGH_WORDS:
                break
    return asked


def answer_of(messages: Messages) -> str:
    """Returns everything the doctor says."""
    return "\n".join(message["content"] for message in messages if message["role"] == "assistant")


def normalized_words(text: str) -> list[str]:
    """Returns the words in lower case without punctuation: what two texts must share to be the same."""
    return (ASCII_WORD if text.isascii() else WORD).findall(text.lower())
