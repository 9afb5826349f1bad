"""The text rules: what each mends, what none may touch, and that a second cleaning changes nothing."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medtune.data
from medtune.data.cleaning.rules import TEXT_RULES, Cleaner

BRANDS = ["Chat Doctor", "ChatDoctor", "HealthCareMagic", "HCM", "iCliniq", "Healthcare Magic"]
ALL = Cleaner(dict.fromkeys(TEXT_RULES, True), BRANDS)


def cleaned(text: str, *rules: str, role: str = "assistant") -> str:
    """The text after the rules, or after all."""
    cleaner = Cleaner({rule: rule in rules for rule in TEXT_RULES}, BRANDS) if rules else ALL
    messages, _ = cleaner([{"role": role, "content": text}])
    return messages[0]["content"]


MENDED = [
    ("mojibake", "It doesnâ\x80\x99t hurt, cafÃ©, 5 Âµg", "It doesn\u2019t hurt, café, 5 µg"),
    ("markup", "<p>Fever &amp; chills&nbsp;since&#160;Monday</p>\r\n\r\n\t\t", "Fever & chills since Monday"),
    ("markup", "10<sup>9</sup>/L of H<sub>2</sub>O", "10^9/L of H2O"),
    ("markup", "a\u200bb\x00c \ufeffd   e \n\n\n\nf", "abc d e\n\nf"),
    ("markup", "&amp;amp;lt; 5", "< 5"),
    ("links", "Rest. for further information consult an orthopaedician and traumatologist online --> <link>", "Rest."),
    ("links", "Rest. for more information consult a urologist online -->", "Rest."),
    ("links", "Rest. revert after five days to a general practitioner online. ---> <link>",
     "Rest. revert after five days"),
    ("links", "Visit https://example.org/online --> <link>", ""),
    ("links", "The leaflet (https://example.org/a) says: rest.", "The leaflet says: rest."),
    ("links", "The page https://example.org/flu says to rest.", "The page says to rest."),
    ("contacts", "Call me on +1 202-555-0143 or jane.roe@example.org, MRN 00012345, DOB 02/03/1980",
     "Call me on [phone] or [email], [id], [date of birth]"),
    ("contacts", "Phone (202) 555-0143. SSN 123-45-6789, born on 2 March 1980",
     "Phone [phone]. [id], born on [date of birth]"),
    ("contacts", "My aunt was born on 3rd March 1950", "My aunt was born on [date of birth]"),
    ("decimals", "Take 0. 5 mg; it was 98. 6 F, about 1. 5 x 10 and 12. 5 %.",
     "Take 0.5 mg; it was 98.6 F, about 1.5 x 10 and 12.5 %."),
    ("names", "Drink water. Regards, Dr. Example Person", "Drink water."),
    ("names", "Rest. Dr. John Smith, MD", "Rest."),
    ("names", "Rest.\nThanks, Dr Rao", "Rest.\n"),
    ("names", "Hi Dr. Smith, I cough", "Hi doctor, I cough"),
    ("names", "my cardiologist Dr. Jones said no", "my cardiologist said no"),
    ("names", "My cardiologist, Dr. Jones, agreed. Dr. O'Brien's plan", "My cardiologist agreed. The doctor's plan"),
    ("products", "Thanks for using Chat Doctor. Rest.", "Rest."),
    ("products", "I read on HealthCareMagic that it helps.", "I read that it helps."),
    ("products", "Rest. Regards, HCM", "Rest."),
    ("greetings", "Hello, welcome to Example Clinic. Rest. Take care.", "Rest."),
    ("greetings", "Hi, thanks for your query. I have gone through your question and understand your concern. Rest. "
     "Hope this helps. Wish you good health. Get back with further queries", "Rest."),
    ("recase", "rest now, e.g. in bed. i think i'm right. see dr. who",
     "Rest now, e.g. in bed. I think I'm right. See dr. who"),
    ("recase", "mri and ecg were normal. utis heal. nsaids help. x-rays too.\nct next",
     "MRI and ecg were normal. UTIs heal. NSAIDs help. X-rays too.\nCT next"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "before", "after"), MENDED)
def test_each_rule_mends_what_it_is_for(rule: str, before: str, after: str) -> None:
    assert cleaned(before, rule) == after
    _, places = Cleaner({name: name == rule for name in TEXT_RULES}, BRANDS)([{"role": "assistant", "content": before}])
    assert list(places) == [rule] and places[rule] > 0


# Every one of these means something: a dose, a number, a negation, a warning, a disease, a word of the patient.
KEPT = [
    "x < 3 and y > 2, pH<7, a <b and c> d, AT&T; <|im_end|>",
    "“Curled” quotes, 5 µg, 37 °C, café, 👩‍⚕️, 発熱 and a lone \ufffd stay.",
    "Fever --> antibiotics --> rest.",
    "Consult a cardiologist immediately. For further advice consult a urologist.",
    "Call 911, 112, 999, 988 or 111. BP 120/80, WBC 4500-11000, platelets 250000, in 1980, 2008-2010.",
    "A viral load of 1500000 copies, 9000000000 cells, 120-130-140, on 02/03/2020, 10mg@8.30 pm.",
    "Try this:\n1. 5 days of rest\n2. 10 mg of cetirizine",
    "First seen in 2019. 5 years later it was gone.",
    "You have diabetes type 2. 5 mg of glipizide is usual.",
    "Take prednisone 1. 5 mg at first 2. 10 mg after a week.",
    "Parkinson, Graves and Crohn gave diseases their names. Wear Dr. Scholl's insoles. A DRE is due.",
    "The level was 2. 5 mg is too much. 1. 2 weeks ago.",
    "Ask your Dr. Ibuprofen is not for you.",
    "HCM is a disease of the heart.",
    "If a month of it does little, ask a chat doctor about other treatments.",
    "Do not take it. Never mix them. Take care of the wound. Hope you do not have fever.",
    "Contact your doctor if you have any concerns. Ask for help if you need it. Come back if it gets worse.",
    "Thank you for answering me. Let me know if the pain gets worse. Go to the emergency department now.",
    "Normal casing. e.g. this, i.e. that.",
]


@pytest.mark.parametrize("text", KEPT)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_meaning_is_left_alone(text: str, role: str) -> None:
    assert cleaned(text, role=role) == text


def test_a_pointer_that_warns_loses_only_its_arrow() -> None:
    text = "For further information consult a cardiologist online immediately"
    assert cleaned(f"{text} --> <link>") == text


def test_questions_lose_only_salutations_on_their_own_and_last_pleas() -> None:
    assert cleaned("Hi doctor,\nI cough. Please help.", role="user") == "I cough."
    assert cleaned("Dear Doctor,My arm hurts. Thanks in advance", role="user") == "My arm hurts."
    for text in ("Hello, I am 5.", "hi my arm hurts", "please help i am scared", "Hope this helps. I take 5 mg."):
        assert cleaned(text, role="user") == text


def test_an_answer_of_boilerplate_becomes_empty() -> None:
    assert cleaned("Hello, welcome to Example Clinic. Regards, Dr. Example Person -->") == ""
    assert cleaned("Hope I have answered your query. Let me know if I can assist you further. Regards, HCM") == ""


def test_a_system_message_keeps_its_words() -> None:
    text = "You work for Chat Doctor. Hope this helps.  <b>Be brief</b>"
    assert cleaned(text, role="system") == "You work for Chat Doctor. Hope this helps. Be brief"


def test_counts_hold_no_text() -> None:
    _, places = ALL([{"role": "user", "content": "I am jane.roe@example.org and joe@example.org"}])
    assert places == {"contacts": 2}


def test_the_bundled_consultations_come_out_unchanged() -> None:
    path = Path(medtune.data.__file__).with_name("consultations.jsonl")
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        assert ALL(messages) == (messages, {})


FRAGMENTS = [before for _, before, _ in MENDED] + KEPT
FRAGMENTS += re.findall(r"\S+\s?|\s", " ".join(FRAGMENTS))
FRAGMENTS += [". ", ", ", "\n", " ", "<", ">", "(", ")", "&", "&#38;", "#38;", "amp;", "\0", "\ud800", "Ã", "â", "\x80"]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(st.characters(), max_size=8)), max_size=20).map("".join),
    st.sampled_from(["user", "assistant", "system"]),
    st.sets(st.sampled_from(TEXT_RULES)),
)
def test_cleaning_twice_is_cleaning_once(text: str, role: str, off: set[str]) -> None:
    cleaner = Cleaner({rule: rule not in off for rule in TEXT_RULES}, BRANDS)
    once, _ = cleaner([{"role": role, "content": text}])
    assert cleaner(once) == (once, {})


@pytest.mark.parametrize(
    "part",
    ["a", " ", "\n", "<", "<p ", "<p a=", "&amp;", "&#38;", "1. ", "0. 5 ", "12. 5 mg ", "1-", "1 ", "a@", "a.",
     "-", "--> ", "\0", "Dr. ", "Dr. Aa ", "Aa ", "i understand ", "hope this ", "regards ", "thanks. ", "Hi, ",
     "http://", "https://a.b ", "Chat ", "to a b online ", "revert ", "call ", "Ã", "â\x80", "\u200d",
     "i ", "a. b ", "(", ". "],
)  # fmt: skip
def test_time_is_linear_in_hostile_text(part: str) -> None:
    tail = " online regards Dr. hope <link> @ Chat Doctor &; http 12345 "  # opens the gates of all rules
    for role, length in (("assistant", 200_000), ("user", 20_000)):
        cleaned(part * (length // len(part)) + tail, role=role)
