"""A row of a known layout -> checked messages; a row that cannot be a conversation says why.

Everything in a row is used, or counted in `unused`: what a model should have read is never dropped without a word.
"""

import re
from collections import Counter
from typing import Any

from medtune.config.enums import Format
from medtune.config.schema import Speakers
from medtune.data.reading import speakers as labels
from medtune.data.reading.cells import is_empty, kind_of, parsed, plain_text
from medtune.data.reading.formats import YES_OR_NO, RowFormat, truth
from medtune.data.reading.rejects import RejectRow
from medtune.data.reading.sources import RepeatedKey

# Keys of a turn under which the public sets say who speaks, and what.
ROLE_KEYS = ("role", "from", "speaker", "sender", "author")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance")
SHAREGPT_KEYS = ("from", "value")
# A run of letters and digits; in Chinese and Japanese, which put no spaces, a character.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
ASCII_WORD = re.compile(r"[a-z0-9_]+")  # the same in most texts, in half the time
ENOUGH_WORDS = 8  # a first message below it ("Hi doctor") does not tell one patient from another
NO_QUESTION = "without a question"
FORBIDDEN = "forbidden"  # the rule of rows that say themselves not to train on them

# A message: role and content as text; `weight` 0, as OpenAI's format has it, where its answer is no target.
Message = dict[str, Any]
Messages = list[Message]


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


def raw_turns(row: Message, layout: RowFormat, unused: Counter[str]) -> Messages:
    """Returns what a row says, as turns {role, content} with the row's own roles and contents."""
    columns = layout.columns
    if "messages" in columns:
        turns = turns_in(row.get(columns["messages"]), layout, unused)
        return turns + last_answer(row, turns, layout, unused)
    question, answer = (text_or_list(row, columns[part]) for part in ("question", "answer"))
    if layout.format is Format.alpaca and columns["question"] != columns["instruction"]:
        instruction = text_or_list(row, columns["instruction"])
        if isinstance(instruction, list) or isinstance(question, list):
            named = columns["instruction"] if isinstance(instruction, list) else columns["question"]
            raise RejectRow(f"with a list in the column {named}, where text belongs")
        if instruction != layout.instruction:
            question = f"{instruction or ''}\n\n{question or ''}".strip()
    elif not question and "title" in columns:
        question = text_or_list(row, columns["title"])
    answered = turns_of(answer, layout, unused) if isinstance(answer, list) else [spoken("assistant", answer)]
    asked = turns_of(question, layout, unused) if isinstance(question, list) else [spoken("user", question)]
    if answered and labels.role_of(str(answered[0]["role"]), layout.speakers) != labels.DOCTOR:
        repeated = {turn["content"] for turn in answered}  # the whole conversation, its question included
        if any(turn["content"] and turn["content"] not in repeated for turn in asked):
            raise RejectRow(f"whose column {columns['answer']} answers another question")
        return answered
    return asked + answered


def spoken(role: Any, content: Any) -> Message:
    """Returns a turn."""
    return {"role": role, "content": content}


def text_or_list(row: Message, column: str) -> Any:
    """Returns a cell: its text, or the list of turns in it; None where there is nothing. Raises `RejectRow` for
    a number and the like.
    """
    value = row.get(column)
    if is_empty(value):
        return None
    found = parsed(value)
    if isinstance(found, list) and all(isinstance(turn, dict) for turn in found):
        return found
    if not isinstance(value, str):
        raise RejectRow(f"with {kind_of(value)} in the column {column}, where text belongs")
    return value


def text_cell(row: Message, column: str) -> str | None:
    """Returns the text in a cell; None where there is nothing. Raises `RejectRow` for a number and the like."""
    value = row.get(column)
    if is_empty(value):
        return None
    if not isinstance(value, str):
        raise RejectRow(f"with {kind_of(value)} in the column {column}, where text belongs")
    return value


def turns_in(value: Any, layout: RowFormat, unused: Counter[str]) -> Messages:
    """Returns the turns of a cell: a list of turns, or a dialogue as text. Raises `RejectRow`."""
    found = parsed(value)
    if layout.format is Format.turns and isinstance(value, str) and not isinstance(found, list):
        return labels.dialogue(value, layout.speakers)
    if found and isinstance(found, list) and all(isinstance(turn, str) for turn in found):
        return labels.dialogue(found, layout.speakers)
    if layout.format is Format.turns and not isinstance(found, list):
        raise RejectRow("without turns that begin with 'patient:' or 'doctor:'")
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise RejectRow("whose messages are no list of {role, content}")
    return turns_of(found, layout, unused)


def turns_of(found: Messages, layout: RowFormat, unused: Counter[str]) -> Messages:
    """Returns turns with role and content under these names, and a weight of 0 where an answer is not to be trained on.

    Raises `RejectRow` where no turn says who speaks.
    """
    if not all(isinstance(turn, dict) for turn in found):
        raise RejectRow("whose messages are no list of {role, content}")
    first = SHAREGPT_KEYS if layout.format is Format.sharegpt else ()
    turns = [named_turn(turn, first, unused) for turn in found]
    if found and not any(turn["role"] for turn in turns):
        keys = " and ".join(dict.fromkeys(str(key) for turn in found for key in turn)) or "no keys"
        raise RejectRow(f"whose turns have {keys[:60]}, not role and content")
    return turns


def named_turn(turn: Message, first: tuple[str, ...], unused: Counter[str]) -> Message:
    """Returns a turn with role and content under these names. `first`: the keys to look for before others."""
    role = next((key for key in (*first[:1], *ROLE_KEYS) if key in turn), None)
    content = next((key for key in (*first[1:], *CONTENT_KEYS) if key in turn and key != role), None)
    named = spoken(turn[role] if role else None, turn[content] if content else None)
    for key, value in turn.items():
        if key in (role, content) or is_empty(value):
            continue
        if key == "weight" or key in YES_OR_NO:
            said = truth(value)
            if said not in (0, 1):
                raise RejectRow(f"with a turn of {key} {str(value)[:12]!r}, neither 0 nor 1")
            if not said:
                named["weight"] = 0
        else:
            unused[f"turn key {key}"] += 1
    return named


def last_answer(row: Message, turns: Messages, layout: RowFormat, unused: Counter[str]) -> Messages:
    """Returns the answer that a column of its own has to a conversation that ends with a question."""
    if "answer" not in layout.columns or is_empty(row.get(layout.columns["answer"])):
        return []
    column = layout.columns["answer"]
    if not turns or labels.role_of(str(turns[-1]["role"]), layout.speakers) != labels.PATIENT:
        unused[f"column {column}"] += 1
        return []
    value = parsed(row[column])
    if isinstance(value, str):
        return [spoken("assistant", value)]
    answer = turns_of(value if isinstance(value, list) else [value], layout, unused)
    if [turn["content"] for turn in answer[:-1]] not in ([], [turn["content"] for turn in turns]):
        raise RejectRow(f"whose column {column} answers another conversation")
    return answer[-1:]


def history_turns(value: Any, layout: RowFormat, unused: Counter[str]) -> Messages:
    """Returns what was said before a question: pairs of question and answer, turns, or a dialogue as text."""
    if is_empty(value):
        return []
    found = parsed(value)
    if isinstance(found, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in found):
        return [spoken(role, words) for pair in found for role, words in zip(("user", "assistant"), pair, strict=True)]
    if isinstance(found, list) and all(isinstance(turn, dict) for turn in found):
        return turns_of(found, layout, unused)
    if isinstance(found, str) or (isinstance(found, list) and all(isinstance(turn, str) for turn in found)):
        return list(labels.dialogue(found, layout.speakers))
    raise RejectRow(f"whose column {layout.columns['history']} holds no turns")


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
