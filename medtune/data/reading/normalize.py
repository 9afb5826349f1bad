"""A row of a known layout -> checked messages; a row that cannot be a conversation says why.

Everything in a row is used, or counted in `unused`: what a model should have read is never dropped without a word.
"""

import re
from collections import Counter
from typing import Any

from medtune.config.schema import Speakers
from medtune.data.reading import speakers as labels
from medtune.data.reading.cells import is_empty, kind_of, parsed, plain_text
from medtune.data.reading.formats import RowFormat, truth
from medtune.data.reading.rejects import RejectRow
from medtune.data.reading.sources import RepeatedKey
from medtune.data.reading.turns import Message, Messages, history_turns, raw_turns, spoken, text_cell

# A run of letters and digits; in Chinese and Japanese, which put no spaces, a character.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
ASCII_WORD = re.compile(r"[a-z0-9_]+")  # the same in most texts, in half the time
ENOUGH_WORDS = 8  # a first message below it ("Hi doctor") does not tell one patient from another
NO_QUESTION = "without a question"
FORBIDDEN = "forbidden"  # the rule of rows that say themselves not to train on them


def normalize(row: Any, layout: RowFormat, system_prompt: str, unused: Counter[str]) -> Messages:
    """Returns the messages {role, content} of a row: system, then user and assistant in turn, the assistant last.

    Contents are stripped. The system message is always explicit, because some chat templates slip in one of their own
    where it is missing. An answer that is not to be trained on has a weight of 0. What is not used of the row is
    counted in `unused`. Raises `RejectRow`.
    """
    if not isinstance(row, dict):
        raise RejectRow(why_unparsed(row) if isinstance(row, Exception) else "that are no {column: value} objects")
    unused.update(f"column {name}" for name, value in row.items() if name not in layout.used and not is_empty(value))
    require_allowed(row, layout)
    count_title(row, layout, unused)
    turns = raw_turns(row, layout, unused)
    if "history" in layout.columns:
        turns = [*history_turns(row.get(layout.columns["history"]), layout, unused), *turns]
    messages = validate_messages(turns, layout.speakers, unused)
    if "context" in layout.columns:
        add_context(messages, row, layout.columns["context"], unused)
    own = text_cell(row, layout.columns["system"]) if "system" in layout.columns else None
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": (own or system_prompt).strip()})
    elif own and own.strip() != messages[0]["content"]:
        raise RejectRow(f"whose system message is not what the column {layout.columns['system']} says")
    return messages


def count_title(row: Message, layout: RowFormat, unused: Counter[str]) -> None:
    """Counts a headline that stands beside a question: it is read only where there is no other."""
    if "title" in layout.columns and not is_empty(row.get(layout.columns["title"])):
        unused[f"column {layout.columns['title']}"] += not is_empty(row.get(layout.columns["question"]))


def why_unparsed(error: Exception) -> str:
    """Returns why a row is left out that is no value at all."""
    return str(error) if isinstance(error, RepeatedKey) else "that cannot be parsed"


def require_allowed(row: Message, layout: RowFormat) -> None:
    """Raises `RejectRow` for a row that says itself not to train on it."""
    for column in layout.flags:
        value = row.get(column)
        if not is_empty(value) and truth(value) in (False, 0):
            raise RejectRow(f"that say {column}: {str(value).lower()}", FORBIDDEN)


def add_context(messages: Messages, row: Message, column: str, unused: Counter[str]) -> None:
    """Puts what the first question is about below it."""
    value = row.get(column)
    if is_empty(value):
        return
    text = plain_text(parsed(value))
    if text is None:
        unused[f"column {column}"] += 1
        return
    first = next(message for message in messages if message["role"] == "user")
    if text.strip() not in first["content"]:
        first["content"] = f"{first['content']}\n\n{text.strip()}"


def validate_messages(turns: Messages, speakers: Speakers, unused: Counter[str]) -> Messages:
    """Returns the messages with standard roles and stripped contents.

    What the doctor says before the first question, and what the patient says after the last answer, is left out; so is
    what follows the last answer that may be trained on. Raises `RejectRow`.
    """
    clean = [standard(turn, speakers) for turn in turns]
    if any(not m["content"].isascii() and broken(m["content"]) for m in clean):
        raise RejectRow("with broken characters (half of a surrogate pair)")
    system = clean[:1] if clean and clean[0]["role"] == "system" else []
    talk = clean[len(system) :]
    while talk and talk[0]["role"] == "assistant":
        unused["the doctor's words before the first question"] += 1
        del talk[0]
    if talk and talk[-1]["role"] == "user":
        unused["the patient's words after the last answer"] += bool(talk[-1]["content"]) and len(talk) > 1
        del talk[-1]
    if not talk or not talk[-1]["content"]:
        raise RejectRow("without an answer" if not clean or any(m["role"] == "user" for m in clean) else NO_QUESTION)
    if [m["role"] for m in talk] != ["user", "assistant"] * (len(talk) // 2):
        raise RejectRow("whose roles do not alternate user, assistant")
    if not all(m["content"] for m in talk if m["role"] == "user"):
        raise RejectRow(NO_QUESTION)
    if not all(m["content"] for m in clean):
        raise RejectRow("with an empty message")
    while talk and talk[-1].get("weight") == 0:
        unused["turns after the last answer that may be trained on"] += 2
        del talk[-2:]
    if not talk:
        raise RejectRow("none of whose answers may be trained on", FORBIDDEN)
    return system + talk


def standard(turn: Message, speakers: Speakers) -> Message:
    """Returns a turn with a standard role and its stripped text. Raises `RejectRow`."""
    role = standard_role(str(turn["role"]), speakers)
    content = turn["content"]
    if content is not None and not isinstance(content, str):
        content = plain_text(content)
        if content is None:
            raise RejectRow(f"whose {turn['role']} message is not text but {kind_of(turn['content'])}")
    message = spoken(role, (content or "").strip())
    return message | {"weight": 0} if role == "assistant" and turn.get("weight") == 0 else message


def standard_role(name: str, speakers: Speakers) -> str:
    """Returns system, user or assistant for the role of a turn, by whatever name. Raises `RejectRow`."""
    if name.lower() == "system":
        return "system"
    if name == "None":
        raise RejectRow("with a turn that names no speaker (as 'patient:' or 'doctor:')")
    role = labels.role_of(name, speakers)
    if role not in (labels.PATIENT, labels.DOCTOR):  # where role and content are swapped, it is what a patient wrote
        raise RejectRow(labels.unknown_speaker(name))
    return role


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
