"""Who speaks in a dialogue, in whatever form and language its labels are."""

import pytest

from medtune.config.schema import Speakers
from medtune.data.reading.rejects import RejectRow
from medtune.data.reading.speakers import DOCTOR, HEADING, OTHER, PATIENT, dialogue, role_of

NOBODY = Speakers()


@pytest.mark.parametrize(
    ("label", "role"),
    [
        *((label, PATIENT) for label in ("Patient", "PT", "patiente", "患者", "Пациент")),
        *((label, DOCTOR) for label in ("doctor", "Dr.", "Dr. Smith", "Médico", "Arzt", "医生")),
        *((label, OTHER) for label in ("Nurse", "Guest_family", "guest clinician", "Patient's wife", "Doctor 2")),
        *((label, HEADING) for label in ("Note", "Treatment plan", "Step 2", "Take care")),
        *((label, None) for label in ("Paracetamol", "Warm water")),
    ],
)
def test_a_label_says_who_speaks(label: str, role: str | None) -> None:
    assert role_of(label, NOBODY) == role


@pytest.mark.parametrize(
    "text",
    [
        "Patient: I cough.\nDoctor: Rest.",
        "patient: I cough.\n\ndoctor:Rest.",
        "[patient] I cough.\n[doctor] Rest.",
        "[Patient]: I cough.\n[Doctor]: Rest.",
        "**Patient:** I cough.\n**Doctor:** Rest.",
        "<patient> I cough. <doctor> Rest.",
        "Patient: I cough. Doctor: Rest.",
        "### Human: I cough.### Assistant: Rest.",
        "P: I cough.\nD: Rest.",
        "Pt: I cough.\nDr. Who: Rest.",
        "Paciente: I cough.\nMédico: Rest.",
        "患者\uff1aI cough.\n医生\uff1aRest.",
        "Doctor: What brings you?\nPatient: I cough.\nDoctor: Rest.",
    ],
)
def test_labels_of_any_form_begin_a_turn(text: str) -> None:
    turns = [(turn["role"], turn["content"]) for turn in dialogue(text, NOBODY)]
    assert turns[-2:] == [(PATIENT, "I cough."), (DOCTOR, "Rest.")]


@pytest.mark.parametrize(
    "answer",
    [
        "Rest.\nNote: drink.", "Rest.\n- Ibuprofen: with food", "Ibuprofen: 200 mg", "See\nhttps://example.org",
        "Take vitamin D: it helps.", "Tell your Doctor: it hurts", "Come at\n10:30 tomorrow",
        "Two things:\nrest and water",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_label_stays_in_the_answer(answer: str) -> None:
    (_, turn) = dialogue(f"Patient: I cough.\nDoctor: {answer}", NOBODY)
    assert turn["content"] == answer


@pytest.mark.parametrize(
    "label", ["Nurse", "Guest_family", "Mother", "Maria", "Speaker 1", "Doctor 2", "护士", "Infirmière"]
)
@pytest.mark.parametrize("between", ["\n", " "])
def test_somebody_else_leaves_the_row_out(label: str, between: str) -> None:
    with pytest.raises(RejectRow, match="with the unknown speaker"):
        dialogue(between.join(["Patient: I cough.", f"{label}: Take twelve.", "Doctor: Rest."]), NOBODY)


def test_text_before_the_first_label_is_the_patients() -> None:
    first, _ = dialogue("A man of 50.\nPatient: I cough.\nDoctor: Rest.", NOBODY)
    assert first == {"role": PATIENT, "content": "A man of 50.\nI cough."}
    with pytest.raises(RejectRow, match="names no speaker"):
        dialogue(["Patient: I cough.", "Rest."], NOBODY)
