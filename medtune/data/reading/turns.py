"""A row of a known layout -> its turns {role, content}, with the row's own roles and contents, unchecked."""

from collections import Counter
from typing import Any

from medtune.config.enums import Format
from medtune.data.reading import speakers as labels
from medtune.data.reading.cells import is_empty, kind_of, parsed
from medtune.data.reading.formats import WEIGHTS, YES_OR_NO, RowFormat, truth
from medtune.data.reading.rejects import RejectRow

# Keys of a turn under which the public sets say who speaks, and what.
ROLE_KEYS = ("role", "from", "speaker", "sender", "author")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance")
SHAREGPT_KEYS = ("from", "value")

# A message: role and content as text; `weight` 0, as OpenAI's format has it, where its answer is no target.
Message = dict[str, Any]
Messages = list[Message]


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
    found = None if is_empty(row.get(column)) else parsed(row[column])
    if isinstance(found, list) and all(isinstance(turn, dict) for turn in found):
        return found
    return text_cell(row, column)


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
    return turns_of(found, layout, unused)


def turns_of(found: Any, layout: RowFormat, unused: Counter[str]) -> Messages:
    """Returns turns with role and content under these names, and a weight of 0 where an answer is not to be trained on.

    Raises `RejectRow` where there is no list of them, or no turn says who speaks.
    """
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
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
        if key in (*WEIGHTS, *YES_OR_NO):
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
