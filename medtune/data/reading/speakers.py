"""Who speaks: the label of a turn -> patient, doctor, or somebody else; a dialogue as text -> its turns.

What somebody else says is never taken for the words of the speaker before: such a row is left out, and counted, until
`data.speakers` says who it is.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from medtune.config.schema import Speakers
from medtune.data.reading.rejects import RejectRow

PATIENT, DOCTOR, HEADING, OTHER = "user", "assistant", "heading", "other"

# In lower case, the words of a label without marks. Sets in other languages have labels of their own.
PATIENTS = """
    patient|pt|pat|p|client|user|human|person|asker|questioner|sufferer|paciente|paciente hombre|paciente mujer|patiente
    |patientin|patient in|paziente|patiënt|patienten|potilas|hasta|pacjent|pacjentka|пациент|пациентка|больной|больная
    |pasien|bệnh nhân|ασθενής|חולה|מטופל|מטופלת|المريض|المريضة|مريض|مريضة|مریض|بیمار|रोगी|मरीज|मरीज़|রোগী|நோயாளி
    |患者|病人|病患|患者さん|환자|ผู้ป่วย|คนไข้
"""
DOCTORS = """
    doctor|dr|doc|d|physician|clinician|provider|gp|general practitioner|md|specialist|consultant|surgeon|psychiatrist
    |dermatologist|cardiologist|pediatrician|paediatrician|gynecologist|gynaecologist|neurologist|assistant|gpt|model|bot
    |ai|chatbot|médico|medico|médica|medica|doctora|doutor|doutora|dra|docteur|docteure|médecin|medecin|arzt|ärztin
    |doktor|doktorin|dottore|dottoressa|dott|arts|dokter|huisarts|läkare|läkaren|lege|læge|lääkäri|hekim|lekarz|lekarka
    |врач|доктор|bác sĩ|γιατρός|רופא|רופאה|الطبيب|الطبيبة|طبيب|دكتور|الدكتور|پزشک|دکتر|डॉक्टर|चिकित्सक|ডাক্তার
    |医生|醫生|医师|醫師|大夫|先生|お医者さん|의사|แพทย์|หมอ
"""
OTHERS = """
    nurse|family|guest|relative|relatives|mother|father|mom|mum|dad|parent|parents|wife|husband|spouse|partner|son
    |daughter|child|brother|sister|sibling|aunt|uncle|grandmother|grandfather|grandma|grandpa|grandson|granddaughter
    |friend|neighbor|neighbour|caregiver|carer|guardian|companion|attendant|interpreter|translator|pharmacist|therapist
    |midwife|paramedic|receptionist|secretary|technician|intern|resident|student|colleague|observer|interviewer
    |interviewee|speaker|moderator|operator|dispatcher|social worker|medical assistant|physician assistant
    |nurse practitioner|staff|system|tool|function|observation|unknown
    |enfermera|enfermero|madre|padre|hijo|hija|esposo|esposa|familiar|infirmière|infirmier|mère|père|fils|fille|mari
    |krankenschwester|pfleger|mutter|vater|sohn|tochter|angehörige|infermiera|figlio|figlia|護士|护士|家属|家屬|家族|母亲
    |父亲|看護師|간호사|보호자|медсестра|мать|отец|ممرضة|ممرض|الأم|الأب
"""
# Words that begin a line of what somebody says, and are nobody.
HEADINGS = """
    note|notes|ps|nb|warning|caution|important|tip|tips|advice|plan|treatment|treatments|diagnosis|diagnoses|differential
    |dose|dosage|dosing|medication|medications|medicine|medicines|prescription|rx|investigation|investigations|test
    |tests|labs|results|findings|impression|assessment|history|symptom|symptoms|sign|signs|cause|causes|prevention
    |prognosis|summary|conclusion|background|reason|reasons|example|examples|step|steps|option|options|day|week|month
    |morning|noon|afternoon|evening|night|breakfast|lunch|dinner|snack|diet|exercise|lifestyle|follow|followup|answer
    |question|questions|reply|response|remember|also|first|second|third|finally|avoid|take|age|sex|gender|height|weight
    |bp|pulse|temperature|allergies|allergy|meds|vitals|exam|examination|recommendation|recommendations|therapy|risk
    |risks|benefits|complications|side|duration|frequency|onset|location|severity|problem|problems|solution|fact|facts
    |myth|update|edit|disclaimer|source|sources|reference|references|link|links|subject|title|topic|date|time|name|email
    |phone|contact|emergency|do|don't|yes|no|hello|hi|dear|thanks|regards|if|for|http|https|hint|conditions|procedure
    |vaccines|nutrition|hydration|rest|ice|compression|elevation|goals|goal|monitoring|surgery|management|approach
"""
ENGLISH_LABELS = ("patient", "doctor")


def words_in(listed: str) -> frozenset[str]:
    """Returns the labels of one of the lists above."""
    return frozenset(" ".join(word.split()) for word in listed.split("|"))


ROLES = {
    **dict.fromkeys(words_in(OTHERS), OTHER),
    **dict.fromkeys(words_in(HEADINGS), HEADING),
    **dict.fromkeys(words_in(PATIENTS), PATIENT),
    **dict.fromkeys(words_in(DOCTORS), DOCTOR),
}
QUALIFIERS = frozenset(
    ("guest", "the", "of", "patient's", "patients", "member", "other", "speaker", "person", "second")
)

# A label at the start of a line: "Doctor:", "[doctor]", "**Doctor**:", "<Doctor 2>", "### Human:"; its colon may be a
# wide one, as in Chinese.
COLON = r"[:\uff1a]"
NAME = r"[^\W\d_][\w.'\u2019()/ -]{0,38}?"
LINE_LABEL = re.compile(
    rf"^(?P<mark>[ \t>*_#•-]*)(?:[\[(<{{]\s*(?P<boxed>{NAME})\s*[\])>}}][ \t*_]*{COLON}?"
    rf"|(?P<plain>{NAME})[ \t*_]*{COLON}(?!//)[*_]*)",
    re.MULTILINE,
)
# One to three words before a colon within a line, or in brackets.
SPOKEN = r"[\w.'\u2019/-]+"
INLINE_LABEL = re.compile(rf"(?<![\w.'\u2019-])[\[<]?((?:{SPOKEN} ){{0,2}}{SPOKEN})(?:[\]>]{COLON}?| ?{COLON}(?!//))")
MARKS = 6  # characters before a label within a line that are looked at
ENDED = re.compile(r"(?:[.!?\u2026\u3002\uff01\uff1f\"\u201d)\]]\s+|[#\[<]\s*)$")  # stands before such a label
LIST_MARK = re.compile(r"[-•]|\*(?!\*)")
NAMED_LIKE = re.compile(r"[^\W\d_a-z][^\W\d]*(?:[_-]\w+)*")  # one word with a capital, or joined by underscores
LONGEST_SHOWN = 20  # characters of a label in a message: it might be a patient's name


def role_of(label: str, speakers: Speakers) -> str | None:
    """Returns who speaks under a label: `PATIENT`, `DOCTOR`, `OTHER`, `HEADING`; None where it tells nothing."""
    return role_of_words(spelled(label), mapped(speakers))


def spelled(label: str) -> str:
    """Returns a label in lower case, its words apart: "Guest_Family 2." is "guest family 2"."""
    return " ".join(re.sub(r"[_.()/-]+", " ", label.lower().replace("\u2019", "'")).split())


def mapped(speakers: Speakers) -> tuple[tuple[str, str], ...]:
    """Returns the labels that the user named, with who speaks under each."""
    named = ((PATIENT, speakers.patient), (DOCTOR, speakers.doctor), (HEADING, speakers.text))
    return tuple((spelled(label), role) for role, labels in named for label in labels)


@lru_cache(maxsize=10_000)
def role_of_words(label: str, named: tuple[tuple[str, str], ...]) -> str | None:
    """Returns what `role_of` does, for a label as `spelled` gives it and labels as `mapped` does."""
    own = dict(named)
    if label in own:
        return own[label]
    if label in ROLES:
        return ROLES[label]
    words = [word for word in label.split() if not word.isdigit()]
    bare = " ".join(words)
    if bare in own or bare in ROLES:
        # "Doctor 2" is another doctor, who speaks to the first; "Step 2" is a heading as "Step" is.
        known = own.get(bare) or ROLES[bare]
        return known if known == HEADING else OTHER
    if words and words[0] in ("dr", "doctor", "dra") and len(words) <= 3:
        return DOCTOR  # with a name
    if words and all(ROLES.get(word) in (OTHER, PATIENT, DOCTOR) or word in QUALIFIERS for word in words):
        return OTHER  # "guest clinician", "patient's wife"
    return HEADING if words and words[0] in ROLES and ROLES[words[0]] == HEADING else None


class Label(NamedTuple):
    """A label in a dialogue: where it begins and ends, who speaks (`PATIENT`, `DOCTOR` or `OTHER`), and its words."""

    start: int
    end: int
    role: str
    words: str


def labels_in(text: str, speakers: Speakers) -> list[Label]:
    """Returns the labels of a dialogue in order."""
    named = mapped(speakers)
    found = [label for match in LINE_LABEL.finditer(text) if (label := line_label(match, named))]
    single_line = "\n" not in text.strip()
    if found and (not single_line or found[0].start == 0):
        starts = {label.end for label in found}
        inline = (label for match in INLINE_LABEL.finditer(text) if (label := inline_label(match, named, single_line)))
        found += [label for label in inline if label.end not in starts]
    return sorted(found)


def line_label(match: re.Match[str], named: tuple[tuple[str, str], ...]) -> Label | None:
    """Returns the label that a line begins with, if somebody speaks there."""
    words = match["boxed"] or match["plain"]
    role = role_of_words(spelled(words), named)
    if role is None and is_name(words, match) and not LIST_MARK.search(match["mark"]):
        role = OTHER
    return None if role in (None, HEADING) else Label(match.start(), match.end(), str(role), words)


def inline_label(match: re.Match[str], named: tuple[tuple[str, str], ...], single_line: bool) -> Label | None:
    """Returns the label within a line that ends where `match` does: of the words before it, as many as name somebody.

    It begins with a capital after the end of a sentence. In a dialogue of a single line it may stand after any space,
    and a name that is not known after the end of a sentence. One of a letter only is too often a vitamin.
    """
    words = match[1].split(" ")
    for first in range(len(words)):
        label = " ".join(words[first:])
        start = match.start(1) + len(match[1]) - len(label)
        before, spoken = match.string[max(0, start - MARKS) : start], spelled(label)
        ended, role = ENDED.search(before) is not None, role_of_words(spoken, named)
        known_word = spoken in ROLES or spoken in dict(named)
        begins = label[:1].isupper() or not label.isascii() or (single_line and known_word)
        known = role in (PATIENT, DOCTOR, OTHER) and len(spoken) > 1 and begins and (ended or single_line)
        name = role is None and single_line and ended and first == len(words) - 1 and is_name(label, match)
        if known or name:
            start -= len(before) - len(before.rstrip(" #[<"))
            return Label(start, match.end(), str(role) if known else OTHER, label)
    return None


def is_name(label: str, match: re.Match[str]) -> bool:
    """Returns whether an unknown label may be somebody's: one word with a capital before what is said.

    A heading has a line of its own, several words, a mark of a list before it, or a number after it, as a dose.
    """
    said = match.string[match.end() :].split("\n", 1)[0].strip()
    return bool(said) and not said[0].isdigit() and NAMED_LIKE.fullmatch(label) is not None


def is_dialogue(text: str, speakers: Speakers) -> bool:
    """Returns whether a text holds turns of a patient or a doctor under their labels."""
    return any(label.role in (PATIENT, DOCTOR) for label in labels_in(text, speakers))


def dialogue(value: str | Sequence[str], speakers: Speakers) -> list[dict[str, str]]:
    """Returns the turns {role, content} of a dialogue, one text or a list of turns; turns of one speaker in a row join.

    Text before the first label belongs to the patient's first turn: it says whose the conversation is. Raises
    `RejectRow` where there are no labels, a turn of a list has none, or somebody else speaks.
    """
    if not isinstance(value, str):
        for turn in value:
            if not (labels := labels_in(turn, speakers)) or turn[: labels[0].start].strip():
                raise RejectRow("with a turn that names no speaker (as 'patient:' or 'doctor:')")
        value = "\n".join(value)
    labels = labels_in(value, speakers)
    if not any(label.role in (PATIENT, DOCTOR) for label in labels):
        raise RejectRow("without turns that begin with 'patient:' or 'doctor:'")
    turns: list[dict[str, str]] = []
    ends = [label.start for label in labels[1:]] + [len(value)]
    for (_, start, role, label), end in zip(labels, ends, strict=True):
        if role == OTHER:
            raise RejectRow(unknown_speaker(label))
        words = value[start:end].strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n{words}".strip()
        else:
            turns.append({"role": role, "content": words})
    before = value[: labels[0].start].strip()
    first = next((turn for turn in turns if turn["role"] == PATIENT), None)
    if before and first is None:
        raise RejectRow("with text before the first speaker, and no patient")
    if before and first is not None:
        first["content"] = f"{before}\n{first['content']}".strip()
    return turns


def unknown_speaker(label: str) -> str:
    """Returns why a row is left out in which somebody else speaks, and what to do about it."""
    shown = label.strip()[:LONGEST_SHOWN]
    typed = shown if re.fullmatch(r"[A-Za-z_][\w ]*", shown, re.ASCII) else f'"{shown}"'
    return (
        f"with the unknown speaker {shown!r} (who is it? data.speakers.doctor=[{typed}], or patient, or text for none)"
    )
