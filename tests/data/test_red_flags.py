"""Emergencies are found in patients' words, and only there; answers that send them to urgent care are told apart."""

import json
from pathlib import Path

import pytest

from medtune.data.cleaning import red_flags as redflag
from medtune.data.cleaning.red_flags import red_flag, urges_care

HELD_OUT = Path(__file__).with_name("red_flags_held_out.jsonl")

URGENT = {
    "suicide": [
        "I wanna kill myself tonight.",
        "My brother says he doesn't want to live anymore",
        "everyone would be better off without me",
        "For years I have wanted to die, and now I've written letters.",
    ],
    "overdose or poison": [
        "swallowed about 50 ibuprofen",
        "my two year old drank some bleach",
        "she drank a bottle of vodka and we cant wake her",
        "my kid swallowed a button battery",
    ],
    "anaphylaxis": [
        "Ate shrimp, now hives and my throat is closing",
        "stung by a bee, rash everywhere, about to pass out",
    ],
    "breathing": [
        "she can hardly breathe and is going blue",
        "my son is choking on a grape",
        "asthma, inhaler does nothing, cant say a full sentence",
    ],
    "throat": ["I can't open my mouth, my voice is muffled and I am drooling"],
    "heart": [
        "crushing chest pain for 20 minutes",
        "Dad, 61: chest tightness going to his left arm, sweating, started an hour ago",
        "like an elephant sitting on my chest",
    ],
    "stroke": ["his face looks lopsided and he sounds drunk", "suddenly my right arm is numb and weak"],
    "head injury": [
        "knocked out and now vomiting",
        "one pupil is bigger",
        "Banged his head, takes warfarin, headache",
        "found her unconscious on the floor",
    ],
    "headache": ["the worst headache of my life, came on suddenly"],
    "seizure": ["He is having a seizure that won't stop, his whole body is jerking"],
    "meningitis": [
        "fever of 39.5 and a stiff neck, light hurts",
        "Fever, and a rash that doesn't fade when I press a glass on it",
    ],
    "young baby": ["our 5 week old has a fever", "My newborn is floppy and won't wake for feeds."],
    "sepsis": ["On chemo and I have a fever of 38.5", "shivering with fever, confused and her skin is mottled"],
    "bleeding": [
        "vomiting blood since this morning",
        "soaking a pad every 15 minutes",
        "black tarry stools and I feel dizzy",
    ],
    "pregnancy": [
        "7 weeks pregnant, sharp pain on one side and spotting",
        "32 weeks pregnant and no movement from the baby since yesterday",
    ],
    "diabetes": ["type 1, vomiting, ketones 4.1, breath smells fruity", "his blood sugar is 540, what now"],
    "eye": ["I suddenly lost the sight in my left eye", "Drain cleaner splashed in my eye"],
    "spine": ["numbness in saddle area and can't urinate"],
    "testicle": ["sudden pain in my right testicle"],
    "abdomen": ["pain moved to the lower right side of my belly, vomiting and can't walk upright"],
    "blood clot": ["left calf is swollen and hot after a long flight"],
    "burn": ["toddler pulled a cup of boiling water over his chest"],
    "bite": ["a snake bit me on the foot", "bitten by a stray dog this morning"],
    "mind": ["stopped drinking two days ago and now he is hallucinating"],
    "heat stroke": ["worked in the sun all day, burning skin and he is confused"],
    "injury": ["he was stabbed in the leg", "my son was hit by a car"],
}
BENIGN = [
    "What are the symptoms of stroke?",
    "Is asthma inherited?",
    "What causes chest pain and sweating in a heart attack?",
    "Can vomiting blood be a sign of an ulcer?",
    "How is meningitis with fever and stiff neck treated?",
    "Which medicines are used in anaphylaxis with throat swelling and hives?",
    "I had a heart attack ten years ago. Can I fly?",
    "Two years ago I was coughing up blood, it was never explained.",
    "When I was a child I had seizures and my whole body was jerking for minutes.",
    "History of stroke with slurred speech and weakness of the right arm in 2015.",
    "My uncle died of a stroke last year, his face was drooping and his speech slurred.",
    "Years ago I wanted to die, therapy helped me a lot.",
    "no chest pain, no sweating, just tired",
    "Patient denies shortness of breath, chest pain or fainting.",
    "I am sad but not suicidal.",
    "I don't want to die, I just want to sleep better.",
    "I would never kill myself, I am only tired of work.",
    "headache without fever, vomiting or stiff neck",
    "Bumped my head on a shelf, no vomiting, not confused, feel fine.",
    "He has a cold but no fever and no rash.",
    "My calf is sore after running, it is not swollen or hot.",
    "Baby moves a lot, no bleeding, 30 weeks pregnant.",
    "What should I do if I get chest pain with sweating?",
    "I'm afraid of choking.",
    "I keep reading about meningitis, fever and stiff neck.",
    "My throat is sore and my nose runs.",
    "I have a mild headache after work.",
    "Which cream helps with dry skin?",
    "my knee hurts when i climb stairs",
    "I cant breathe through my nose, pollen season",
    "this itching is killing me",
    "I have had lower back pain for years.",
    "My toddler has a runny nose and coughs at night.",
    "heartburn after spicy food, any tips",
    "I take two tablets of vitamin D a day, is that fine?",
    "My blood test shows low iron.",
    "Bright red blood on the paper after straining, only a streak.",
    "I feel anxious before exams and my hands shake.",
    "I'm 12 weeks pregnant, can I eat cheese?",
    "My ears ring after the concert.",
    "small kitchen burn on my finger, does it need a plaster",
    "blurry when reading, do I need glasses?",
    "my dog has fleas, can I get bites from them",
    "Is 5.6 a normal sugar level?",
    "I sprained my ankle at football, it is swollen.",
]
URGING = [
    "Call 911 now.",
    "Please go to the emergency department.",
    "go to er now",
    "you have to rush to the nearest hospital",
    "Dial 999 and unlock the door.",
    "Ring 112; do not drive yourself.",
    "He must go to A&E tonight.",
    "take her to casualty without delay",
    "This is a medical emergency.",
    "call an ambulance even if the pain eases",
    "you need immediate medical attention",
    "see a doctor immediately",
    "Consult a surgeon urgently.",
    "she has to be seen today",
    "please get to a hospital right away",
    "Don't wait, go straight to the emergency room.",
    "you should be admitted to hospital at once",
    "urgent evaluation by a neurologist is needed",
    "Do not panic, but go to the ER.",
    "contact poison control",
    "i would take him to the hospital",
]
NOT_URGING = [
    "See a doctor.",
    "You should consult a cardiologist.",
    "avoid going to the er",
    "This is not an emergency.",
    "There is no need to go to hospital.",
    "no need to call an ambulance",
    "You don't need to go to the emergency room.",
    "Rest and drink water.",
    "It is nothing urgent, book an appointment next week.",
    "take an antacid, if the pain persists go to the er",
    "Go to the emergency room if it gets worse.",
    "If it does not improve in two days, see a doctor immediately.",
    "Take the antibiotic for five days.",
    "You may use emergency contraception.",
    "the tumour is er positive",
    "Stop the tablets immediately.",
    "I now think this is a viral infection.",
    "Use the physiotherapist's exercises instead of going to the hospital.",
    "it is useless taking her to the er",
    "Your pressure of 112/70 is fine.",
    "A crisis line can help.",
]


RULES = {f"{rule.category}: {rule.example}": rule for rule in redflag.triage_rules().rules}


@pytest.fixture(scope="module")
def bundled() -> list[tuple[str, str, bool]]:
    """Question, answer and label of each bundled consultation."""
    path = Path(redflag.__file__).parents[1] / "consultations.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def said(row: dict, role: str) -> str:
        return "\n".join(m["content"] for m in row["messages"] if m["role"] == role)

    return [(said(row, "user"), said(row, "assistant"), row["red_flag"]) for row in rows]


@pytest.mark.parametrize(("category", "question"), [(name, q) for name, questions in URGENT.items() for q in questions])
def test_emergencies_are_found(category: str, question: str) -> None:
    assert red_flag(question) == category
    assert red_flag(question.upper().replace("'", "\u2019")) == category


@pytest.mark.parametrize("name", RULES)
def test_every_rule_fires_on_the_example_that_the_table_gives_for_it(name: str) -> None:
    rule = RULES[name]
    text = redflag.normal(rule.example)
    assert rule in redflag.triage_rules().candidates(text) and redflag.holds(rule, text)
    assert red_flag(rule.example)


@pytest.mark.parametrize("question", BENIGN)
def test_negation_history_information_and_everyday_complaints_are_no_emergencies(question: str) -> None:
    assert red_flag(question) is None
    assert red_flag(question.upper()) is None


@pytest.mark.parametrize("answer", URGING)
def test_answers_that_urge_care(answer: str) -> None:
    assert urges_care(answer, "heart")
    assert urges_care(answer.lower().rstrip("."), "suicide")


@pytest.mark.parametrize("answer", NOT_URGING)
def test_answers_that_do_not_urge_care(answer: str) -> None:
    assert not urges_care(answer, "heart")


@pytest.mark.parametrize("answer", ["Call a crisis line.", "Please do not stay alone, ring 988.", "stay with her"])
def test_a_crisis_line_or_company_is_urgent_care_for_suicide_only(answer: str) -> None:
    assert urges_care(answer, "suicide") and not urges_care(answer, "stroke")


def test_bundled_labels_are_met(bundled: list[tuple[str, str, bool]]) -> None:
    found = [label for question, _, label in bundled if red_flag(question)]
    assert sum(found) / len(found) >= 0.95, "precision"
    assert sum(found) / sum(label for _, _, label in bundled) >= 0.92, "recall"


def test_every_bundled_emergency_is_answered_with_urgency(bundled: list[tuple[str, str, bool]]) -> None:
    for question, answer, label in bundled:
        category = red_flag(question)
        if label or category:
            assert urges_care(answer, category or "heart"), question


@pytest.mark.parametrize(
    "text", ["chest pain in my left arm sweating cant breathe not ", "fever. rash. no ", "if it is not the er "]
)
def test_a_text_without_end_is_read(text: str) -> None:
    """A pattern that tried every combination would never come back."""
    red_flag((text * 200_000)[:200_000])
    urges_care((text * 200_000)[:200_000], "heart")


def test_messages_by_somebody_who_never_saw_the_table() -> None:
    """What the audit finds in new words: about two emergencies of three, and hardly anything else."""
    rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    flagged = {
        label: [bool(red_flag(row["text"])) for row in rows if row["emergency"] is label] for label in (True, False)
    }
    assert len(flagged[True]) == len(flagged[False]) == 150
    assert sum(flagged[True]) / 150 >= 0.65, "recall"
    assert sum(flagged[False]) / 150 <= 0.04, "benign messages flagged"
