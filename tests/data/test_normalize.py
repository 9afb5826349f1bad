"""Everything in a row is trained on, read, listed or refused, and nobody is taken for the doctor."""

from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import compose
from medtune.config.schema import Source, Speakers
from medtune.data.reading.formats import detect_format
from medtune.data.reading.normalize import normalize
from medtune.data.reading.rejects import RejectRow
from medtune.data.reading.turns import Messages, spoken
from medtune.runtime.errors import UserError

SYSTEM = "You are a doctor."


@cache
def source() -> Source:
    return compose("data=local", f"data.path='{__file__}'").data


def read(row: dict[str, Any], *others: dict[str, Any]) -> tuple[Messages, Counter[str]]:
    unused: Counter[str] = Counter()
    rows = [(number, each) for number, each in enumerate((row, *others), 1)]
    return normalize(row, detect_format(rows, source(), "data"), SYSTEM, unused), unused


def said(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


QA = {"question": "Is it bad?", "answer": "No."}
TURNS = [{"role": "user", "content": "Is it bad?"}, {"role": "assistant", "content": "No."}]


@pytest.mark.parametrize(
    "history",
    [
        [["I cough.", "Since when?"]],
        '[["I cough.", "Since when?"]]',
        [{"role": "user", "content": "I cough."}, {"role": "assistant", "content": "Since when?"}],
        "Patient: I cough.\nDoctor: Since when?",
    ],
)
def test_what_was_said_before_stands_before_the_question(history: Any) -> None:
    messages, unused = read(QA | {"history": history})
    turns = [("user", "I cough."), ("assistant", "Since when?"), ("user", "Is it bad?"), ("assistant", "No.")]
    assert said(messages)[1:] == turns and not unused


def test_a_row_has_its_own_system_message_and_contradicts_no_other() -> None:
    own = "You are a cardiologist."
    for row in (QA, {"messages": TURNS}, {"messages": [{"role": "system", "content": own}, *TURNS]}):
        messages, unused = read(row | {"system": own})
        assert messages[0] == {"role": "system", "content": own} and not unused
    with pytest.raises(RejectRow, match="whose system message is not what the column system says"):
        read({"messages": [{"role": "system", "content": "You are a nurse."}, *TURNS], "system": own})
    messages, unused = read(QA | {"system": "Heart"})
    assert messages[0]["content"] == SYSTEM and unused == {"column system": 1}, "a name is no message"


def test_what_a_question_is_about_stands_below_it() -> None:
    for row in (QA, {"messages": TURNS}, {"instruction": "Is it bad?", "response": "No."}):
        messages, unused = read(row | {"context": "X-ray: a broken rib."})
        assert messages[1]["content"] == "Is it bad?\n\nX-ray: a broken rib." and not unused
    messages, unused = read(QA | {"context": {"contexts": ["a"], "labels": ["b", "c"]}}, QA | {"context": "text"})
    assert messages[1]["content"] == "Is it bad?" and unused == {"column context": 1}


@pytest.mark.parametrize(
    "flag", [{"train": False}, {"label": False}, {"weight": 0}, {"label": "False"}, {"kto_tag": False}]
)
def test_a_row_that_forbids_training_is_left_out(flag: dict[str, Any]) -> None:
    (name,) = flag
    allowed = {name: {"False": "True"}.get(flag[name], 1 if name == "weight" else True)}
    with pytest.raises(RejectRow, match=f"that say {name}: ") as refused:
        read(QA | flag, QA | allowed)
    assert refused.value.rule == "forbidden"
    messages, unused = read(QA | allowed, QA | flag)
    assert len(messages) == 3 and not unused


@pytest.mark.parametrize("other", [{"weight": 70}, {"label": "flu"}, {"train": "night express"}])
def test_a_column_of_that_name_that_says_something_else_is_listed(other: dict[str, Any]) -> None:
    messages, unused = read(QA | other)
    assert len(messages) == 3 and unused == {f"column {next(iter(other))}": 1}


def test_an_answer_of_weight_0_is_kept_and_marked() -> None:
    first = [TURNS[0], TURNS[1] | {"weight": 0}]
    messages, unused = read({"messages": [*first, *TURNS]})
    assert [message.get("weight") for message in messages] == [None, None, 0, None, None] and not unused
    messages, unused = read({"messages": [*TURNS, *first]})
    assert said(messages)[1:] == [("user", "Is it bad?"), ("assistant", "No.")]
    assert unused == {"turns after the last answer that may be trained on": 2}
    with pytest.raises(RejectRow, match="none of whose answers may be trained on"):
        read({"messages": first})
    with pytest.raises(RejectRow, match=r"with a turn of weight '0\.5', neither 0 nor 1"):
        read({"messages": [TURNS[0], TURNS[1] | {"weight": 0.5}]})


def test_keys_of_turns_are_used_or_listed() -> None:
    turns = [{"speaker": "patient", "text": "Is it bad?"}, {"speaker": "doctor", "text": "No.", "emotion": "calm"}]
    messages, unused = read({"conversation": turns})
    assert said(messages)[1:] == [("user", "Is it bad?"), ("assistant", "No.")] and unused == {"turn key emotion": 1}
    reasoned = [TURNS[0], TURNS[1] | {"reasoning_content": "Hm.", "tool_calls": [{"name": "x"}]}]
    assert read({"messages": reasoned})[1] == {"turn key reasoning_content": 1, "turn key tool_calls": 1}
    with pytest.raises(RejectRow, match="whose turns have who and what, not role and content"):
        read({"messages": [{"who": "patient", "what": "Is it bad?"}]})


def test_the_chosen_answer_ends_a_conversation() -> None:
    for chosen in ("No.", TURNS[1], [TURNS[1]], TURNS):
        messages, unused = read({"messages": TURNS[:1], "chosen": chosen, "rejected": "Yes."})
        assert said(messages)[1:] == [("user", "Is it bad?"), ("assistant", "No.")]
        assert unused == {"column rejected": 1}
    for prompt, chosen in (("Is it bad?", "No."), ("Is it bad?", TURNS), (TURNS[:1], TURNS[1:])):
        messages, _ = read({"prompt": prompt, "chosen": chosen, "rejected": "Yes."})
        assert said(messages)[1:] == [("user", "Is it bad?"), ("assistant", "No.")]


@pytest.mark.parametrize("nothing", ["nan", "N/A", "<noinput>", "NULL", "None", "\\N", "-", " ", float("nan"), None])
def test_words_for_nothing_are_nothing(nothing: Any) -> None:
    messages, _ = read({"instruction": "Is it bad?", "input": nothing, "output": "No."})
    assert messages[1]["content"] == "Is it bad?"
    with pytest.raises(RejectRow, match="without an answer"):
        read(QA | {"answer": nothing}, QA)
    answered = [{"role": "user", "content": "Any allergies?"}, {"role": "assistant", "content": "None"}]
    assert said(read({"messages": answered})[0])[2] == ("assistant", "None"), "a turn that says so means it"


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'user', 'content': \"It's bad?\"}, {'role': 'assistant', 'content': 'No.'}]",
        '[{"role": "user", "content": "It\'s bad?"}, {"role": "assistant", "content": "No."}]',
        {"role": ["user", "assistant"], "content": ["It's bad?", "No."]},
        '{"role": ["user", "assistant"], "content": ["It\'s bad?", "No."]}',
        [{"role": "user", "content": [{"type": "text", "text": "It's bad?"}]}, {"role": "assistant", "content": "No."}],
        ["Patient: It's bad?", "Doctor: No."],
        "Doctor: Hello!\nPatient: It's bad?\nDoctor: No.\nPatient: Thanks.",
    ],
)
def test_turns_are_read_in_whatever_they_are_written(cell: Any) -> None:
    messages, _ = read({"messages": cell})
    assert said(messages)[1:] == [("user", "It's bad?"), ("assistant", "No.")]


# A row of words that each stand in one place: afterwards each is looked for.
KEYS = ["role", "content", "speaker", "text", "from", "value", "weight", "train", "name", "reasoning_content"]
COLUMNS = [
    "messages", "conversations", "dialogue", "question", "answer", "instruction", "input", "output", "prompt", "chosen",
    "rejected", "system", "history", "context", "split", "label", "weight", "train", "title", "Description", "id",
]  # fmt: skip
LABELS = [
    "Patient",
    "Doctor",
    "Pt",
    "Dr. Who",
    "Nurse",
    "Guest_family",
    "Maria",
    "Note",
    "médico",
    "Speaker 2",
    "[doctor]",
]
MANY = settings(
    max_examples=10_000, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip


class Words:
    """Gives out words that stand nowhere else, and remembers where each was put."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}

    def new(self, place: str) -> str:
        word = f"w{len(self.places)}x"
        self.places[word] = place
        return f"{word} is what it says"


def cell(chance: Random, words: Words, column: str) -> Any:
    """Returns a cell of any kind that a column may hold."""
    kind = chance.choice(["text", "turns", "pairs", "dialogue", "items", "flag", "nothing", "split"])
    place = f"column {column}"
    if kind == "text":
        return words.new(place)
    if kind == "turns":
        return [turn(chance, words, number) for number in range(chance.randint(1, 4))]
    if kind == "pairs":
        return [[words.new(place), words.new(place)] for _ in range(chance.randint(1, 2))]
    if kind in ("dialogue", "items"):
        lines = [f"{chance.choice(LABELS)}: {words.new(place)}" for _ in range(chance.randint(1, 5))]
        if not chance.randrange(5):
            lines.insert(0, words.new(place))
        return lines if kind == "items" else chance.choice(["\n", " "]).join(lines)
    values = {
        "split": ["train", "test", "validation"],
        "flag": [0, 1, True, False, 0.5],
        "nothing": [None, "", "nan", []],
    }
    return chance.choice(values[kind])


def any_row(chance: Random, words: Words) -> dict[str, Any]:
    """Returns a row of any columns, mostly beside a question and an answer or a conversation."""
    row = {column: cell(chance, words, column) for column in chance.sample(COLUMNS, chance.randint(1, 5))}
    kind = chance.choice(["question", "messages", "dialogue", "anything"])
    if kind == "question":
        row |= {"question": words.new("column question"), "answer": words.new("column answer")}
    elif kind == "messages":
        pairs = [spoken(role, words.new(f"turn {role}")) for role in ("user", "assistant") * chance.randint(1, 2)]
        row["messages"] = pairs[: chance.choice([-1, len(pairs)]) or None]
    elif kind == "dialogue":
        row["dialogue"] = f"Patient: {words.new('column dialogue')}\nDoctor: {words.new('column dialogue')}"
    return row


def turn(chance: Random, words: Words, number: int) -> dict[str, Any]:
    """Returns a turn of a list."""
    anybody = ["user", "assistant", "patient", "doctor", "nurse", "system"]
    made: dict[str, Any] = {"role": chance.choice(anybody) if chance.randrange(2) else anybody[number % 2]}
    for key in dict.fromkeys(["content", *chance.sample(KEYS[1:], chance.randint(0, 3))]):
        flag = key in ("weight", "train")
        made[key] = chance.choice([0, 1, True, False]) if flag else words.new(f"turn key {key}")
    return made


@MANY
@given(st.integers(0, 2**64))
def test_every_word_of_a_row_is_trained_on_used_listed_or_refused(seed: int) -> None:
    chance, words = Random(seed), Words()
    row = any_row(chance, words)
    try:
        messages, unused = read(row)
    except (RejectRow, UserError):
        return
    text = "\n".join(message["content"] for message in messages)
    left_out = [name for name in unused if not name.startswith(("column ", "turn key "))]
    for word, place in ((word, place) for word, place in words.places.items() if f"{word} " in str(row)):
        listed = place in unused or any(f"column {column}" in unused and word in str(row[column]) for column in row)
        assert word in text or listed or left_out, (row, messages, unused)
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * ((len(messages) - 1) // 2)]
    assert messages[-1].get("weight") != 0


def test_the_rows_of_the_test_above_are_read_often_enough() -> None:
    kept = 0
    for seed in range(1000):
        chance, words = Random(seed), Words()
        row = any_row(chance, words)
        with suppress(RejectRow, UserError):
            kept += len(read(row)[0]) > 2
    assert kept > 100


@MANY
@given(st.integers(0, 2**64))
def test_nobody_but_the_doctor_is_trained_on(seed: int) -> None:
    chance = Random(seed)
    labels = [chance.choice(LABELS) for _ in range(chance.randint(1, 6))]
    lines = [f"{label}: I say w{place}x now." for place, label in enumerate(labels)]
    try:
        messages, _ = read({"dialogue": chance.choice(["\n", " "]).join(lines)})
    except (RejectRow, UserError):
        return
    answers = " ".join(message["content"] for message in messages if message["role"] == "assistant")
    speaker = None
    for place, label in enumerate(labels):
        speaker = speaker if label == "Note" and place else label
        if f"w{place}x " in answers:
            assert speaker in ("Doctor", "Dr. Who", "médico", "[doctor]"), (lines, messages)


def test_labels_that_the_user_knows_are_somebodys() -> None:
    speakers = Speakers(patient=["Guest_family"], doctor=["Nurse"], text=["Maria"])
    config = replace(source(), speakers=speakers)
    row = {
        "dialogue": "Guest_family: He coughs.\nNurse: Since when?\nMaria: is a name.\nPatient: A week.\nDoctor: Rest."
    }
    messages = normalize(row, detect_format([(1, row)], config, "data"), SYSTEM, Counter())
    assert said(messages)[1:] == [
        ("user", "He coughs."), ("assistant", "Since when?\nMaria: is a name."), ("user", "A week."),
        ("assistant", "Rest."),
    ]  # fmt: skip
