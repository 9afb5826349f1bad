"""What is looked for in one row: emergencies that no answer after them treats as such, and the language of rules."""

from collections import Counter
from typing import Any

import pytest

from helpers import compose
from medtune.config.schema import Data
from medtune.data.cleaning.language import is_english
from medtune.data.cleaning.screening import ProcessedRows, RowProcessor, emergencies
from medtune.data.reading.formats import detect_format

CHEST = "I have crushing chest pain for half an hour and my left arm is heavy."
URGENT = "Call 911 right now."
CALM = "Drink tea and see how it goes."


def turns(*contents: str) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def process(rows: list[dict[str, Any]], *words: str) -> ProcessedRows:
    data: Data = compose("data=local", f"data.path='{__file__}'", *words).data
    numbered = list(enumerate(rows, 1))
    return RowProcessor(data, data, detect_format(numbered, data, "data"), frozenset())(numbered)


def test_an_answer_before_an_emergency_does_not_treat_it() -> None:
    before = turns("My knee hurts after running, what is it?", URGENT, CHEST, CALM)
    after = turns("My knee hurts after running, what is it?", CALM, CHEST, URGENT)
    again = turns(CHEST, URGENT, f"{CHEST} Still.", CALM)
    found = process([{"messages": each} for each in (before, after, again)])
    assert [reject.row for reject in found.rejects] == [1]
    assert "does not send an emergency" in found.rejects[0].reason
    assert found.counts["redflag/heart"] == 3 and found.counts["urged/heart"] == 2


def test_each_emergency_is_known_by_the_message_that_describes_it_first() -> None:
    assert emergencies(turns("Hello doctor.", "Hello.", CHEST, CALM)) == {"heart": 2}
    assert emergencies(turns("I cough.", CALM)) == {}


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("The pain is there when you press it.", True),
        ("Should I take it?", True),
        ("Me duele la cabeza desde ayer y tengo fiebre.", False),
        ("Ich habe seit gestern Kopfschmerzen und Fieber.", False),
        ("Ho mal di testa da ieri, che cosa devo fare?", False),
        ("头疼 三天 了 怎么 办", False),
    ],
)
def test_english_is_told_by_its_commonest_words(text: str, english: bool) -> None:
    assert is_english(text.lower().strip(".?").replace(",", "").split()) is english


def test_a_rule_for_english_leaves_other_languages_alone() -> None:
    spanish = {"question": "Dolor de cabeza fuerte", "answer": "Descanse, beba agua y vuelva si tiene fiebre alta."}
    english = {"question": "Headache and fever", "answer": "Rest, and drink enough water until the fever has gone."}
    found = process([spanish, english])
    assert [reject.rule for reject in found.rejects] == ["titles"] and found.rejects[0].row == 2
    assert found.counts["other language"] == 1


def test_a_row_says_which_split_it_is_for() -> None:
    names = ["train", "TEST", "val", "", None, "dev"]
    row = {"question": "Is it bad for me?", "answer": "No, it is not."}
    rows = [row | {"split": name} for name in names]
    assert process(rows).marked.tolist() == [0, 2, 1, -1, -1, 1]
    late = process([*rows, {**rows[0], "split": "somewhere"}])
    assert late.rejects == [] and late.marked.tolist() == [-1] * 7, "a column of other words names no splits"
    assert Counter(late.counts)["unused/column split"] == 5
