"""Every row ends in a split or in the rejects with its reason; splits do not leak; the cache never lies."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers import compose, conversations, write_jsonl
from medtune.config.schema import Data
from medtune.data import pipeline
from medtune.data.funnel import log_report, smaller
from medtune.data.hashing import jaccard, minhash_bands, pairs_of
from medtune.data.prepared import PreparedData, prepare
from medtune.data.splitting.duplicates import near_duplicates
from medtune.data.splitting.split import TRAIN, leakage
from medtune.data.store import SPLITS, Conversation, ConversationTable, write_parquet
from medtune.runtime.errors import UserError

BUNDLED = Path(pipeline.__file__).parent / "consultations.jsonl"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


def local(path: Path, *overrides: str) -> Data:
    return compose("data=local", f"data.path='{path}'", *overrides).data


def prepared(tmp_path: Path, rows: list[Any], *overrides: str) -> PreparedData:
    return prepare(local(write_jsonl(tmp_path / "rows.jsonl", rows), *overrides))


def rejected(found: PreparedData) -> dict[int, str]:
    """Rules by row."""
    rejects = [json.loads(line) for line in found.rejects.read_text().splitlines()]
    return {reject["row"]: reject["rule"] for reject in rejects}


def said(*contents: str, group: str | None = None) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"messages": messages} | ({"group": group} if group else {})


def everything(found: PreparedData) -> list[Any]:
    return [c for name in SPLITS for c in getattr(found, name)]


@pytest.fixture(scope="module")
def bundled() -> list[dict]:
    return [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]


def test_bundled_consultations_are_what_they_claim(bundled: list[dict]) -> None:
    assert len(bundled) >= 200
    assert len({row["topic"] for row in bundled}) >= 25
    assert all(list(row) == ["messages", "topic", "group", "red_flag"] for row in bundled)
    assert sum(len(row["messages"]) > 2 for row in bundled) >= len(bundled) / 3
    assert sum(row["red_flag"] for row in bundled) >= 30
    questions = [row["messages"][0]["content"] for row in bundled]
    assert len(set(questions)) == len(questions)
    words = [len(q.split()) for q in questions]
    assert sum(w <= 12 for w in words) > 40 and sum(w >= 70 for w in words) > 40, "terse and rambling patients"
    assert sum(q == q.lower() for q in questions) > 20, "patients who do not use capitals"


def test_bundled_red_flags_are_answered_with_urgency(bundled: list[dict]) -> None:
    urgent = re.compile(r"emergency|ambulance|right now|at once|immediately|straight away|today|tonight|crisis", re.I)
    for row in bundled:
        if row["red_flag"]:
            assert urgent.search(" ".join(m["content"] for m in row["messages"] if m["role"] == "assistant")), row


def test_bundled_doctors_give_no_doses_names_links_or_phone_numbers(bundled: list[dict]) -> None:
    dose = re.compile(r"\d\s?(mg|mcg|µg|g|ml|units?|tablets?|capsules?|drops?|puffs?)\b", re.I)
    private = re.compile(r"https?:|www\.|@|\bDr\.? [A-Z]|\b(911|112|999|988)\b(?!/)|\d{3}[ -]\d{3,4}\b")
    for row in bundled:
        for message in row["messages"]:
            assert not private.search(message["content"]), message
            if message["role"] == "assistant":
                assert not dose.search(message["content"]), message


def test_bundled_set_loses_no_row_changes_no_word_and_leaks_nothing(bundled: list[dict]) -> None:
    found = prepare(compose().data)
    assert found.report["funnel"] == {"read": 288, "kept": 288} and found.report["changed"] == {}
    by_row = {c.row: c for c in everything(found)}
    assert all(by_row[n].messages[1:] == row["messages"] for n, row in enumerate(bundled, 1))
    groups = [{c.group for c in getattr(found, name)} for name in SPLITS]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert all(len(getattr(found, name)) >= 20 for name in SPLITS)
    assert all(c.messages[0]["role"] == "system" for c in everything(found))
    asked = {c.messages[1]["content"] for c in everything(found)}
    assert not asked & set(compose().eval.prompts), "the sample prompts must be new to the model"


# --- rules ------------------------------------------------------------------------------------------------------------

ANSWER = "That is usually harmless. Rest, drink, and come back if it lasts."


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (said("I have had a cough for a week.", "No."), "short"),
        (said("Cough?", ANSWER), "short"),
        (said("I cough. " * 2000, ANSWER), "long"),
        (said("Swollen lymph node in the neck", ANSWER), "titles"),
        (said("I have had a cough for a week.", "Thanks for your query. Take care."), "empty"),
        (said("I have crushing chest pain that spreads to my left arm and I am sweating.", ANSWER), "redflag"),
        ({"messages": []}, "unusable"),
    ],
)
def test_a_row_rule_drops_its_row_and_says_so(tmp_path: Path, row: dict, rule: str) -> None:
    found = prepared(tmp_path, [*conversations(40), row])
    assert rejected(found) == {41: rule}
    assert found.report["funnel"] == {"read": 41, rule: 1, "kept": 40}


def test_rules_can_be_switched_off(tmp_path: Path) -> None:
    rows = [*conversations(40), said("Swollen lymph node in the neck", ANSWER), said("Cough?", "No.")]
    assert rejected(prepared(tmp_path, rows)) == {41: "titles", 42: "short"}
    assert rejected(prepared(tmp_path, rows, "data.rules.titles=false")) == {42: "short"}
    assert rejected(prepared(tmp_path, rows, "data/preparation=none")) == {}


def test_red_flags_can_be_dropped_kept_and_reported(tmp_path: Path) -> None:
    chest = "I have crushing chest pain that spreads to my left arm and I am sweating."
    rows = [
        *conversations(40),
        said(chest, ANSWER),
        said(chest + " Help me!", "Call an ambulance now, this is an emergency."),
    ]
    for policy, dropped in (("drop", 1), ("keep", 0), ("report", 0)):
        audit = (found := prepared(tmp_path, rows, f"data.redflag={policy}")).report["redflag"]
        assert (audit["policy"], audit["emergencies"], audit["urged"]) == (policy, 2, 1)
        assert len(rejected(found)) == dropped


def test_duplicates_of_every_kind(tmp_path: Path) -> None:
    asked = "I have had a cough for three weeks, it is worse at night and I am always tired. Is it asthma?"
    rows = [
        *conversations(40),
        said(asked, ANSWER),
        said(asked.upper() + "!!", ANSWER.lower()),
        said(asked.replace("always tired", "always so tired"), ANSWER.replace("Rest", "Please rest")),
        said(asked, "Asthma is possible: a breathing test would tell, so ask your own doctor for one."),
        said(asked.replace("three weeks", "two weeks"), "Let a doctor listen to your lungs before anything else."),
    ]
    found = prepared(tmp_path, rows)
    assert rejected(found) == {42: "duplicates", 43: "near_duplicates", 44: "answers_per_question"}
    reasons = [json.loads(line)["reason"] for line in found.rejects.read_text().splitlines()]
    assert reasons[:2] == ["that repeats row 41", "that nearly repeats row 41"]
    first, last = (c for c in everything(found) if c.row in (41, 45))
    assert first.group == last.group, "nearly the same question goes into the same split"
    two = prepared(tmp_path, rows, "data.rules.answers_per_question=2", "data.rules.near_duplicates=null")
    assert rejected(two) == {42: "duplicates"}


def test_one_answer_to_many_questions(tmp_path: Path) -> None:
    rows = [
        said(f"What is the matter with my {part}, doctor{n}?", ANSWER)
        for n, part in enumerate("abcdefghijklmnopqrstuvwxyz")
    ]
    assert Counter(rejected(prepared(tmp_path, [*conversations(40), *rows])).values()) == {"questions_per_answer": 16}


def test_a_question_in_two_declared_groups_never_ends_in_two_splits(tmp_path: Path) -> None:
    asked = [f"What are the symptoms of {name} in adults over sixty years of age?" for name in ("lupus", "gout", "flu")]
    rows = [said(q, f"{ANSWER} {i}{j}{q}", group=f"case {i} {j}") for i in range(30) for j, q in enumerate(asked)]
    found = prepared(
        tmp_path, [*conversations(40), *rows], "data.rules.answers_per_question=null", "data.rules.near_duplicates=null"
    )
    splits: dict[str, set[str]] = {}
    for name in SPLITS:
        for c in getattr(found, name):
            splits.setdefault(c.messages[1]["content"], set()).add(name)
    assert all(len(where) == 1 for where in splits.values())
    assert set(rejected(found).values()) == {"leaks"}
    assert found.report["leakage"]["exact_questions"] == found.report["leakage"]["near_questions"] == 0
    assert found.report["leakage"]["questions_if_split_by_row"] > 0.2, "a random split of the same rows would leak"


def test_benchmark_questions_are_kept_out(tmp_path: Path) -> None:
    exam = "A 45-year-old man comes to the physician because of a three week history of cough and night sweats."
    benchmark = write_jsonl(tmp_path / "exam.jsonl", [{"question": exam, "cop": 1}, {"question": "Is gout inherited?"}])
    rows = [
        *conversations(40),
        said(f"Question 7. {exam} What is it?", ANSWER),
        said("Is gout inherited", ANSWER + "!"),
        said("Is gout inherited or is it only what I eat and drink all day?", ANSWER + " Really."),
    ]
    assert rejected(prepared(tmp_path, rows, f"data.benchmarks=['{benchmark}']")) == {
        41: "benchmarks",
        42: "benchmarks",
    }
    with pytest.raises(UserError, match=r"data\.benchmarks: nowhere is no file here, and no hub set"):
        prepared(tmp_path, rows, "data.benchmarks=[nowhere]")
    answers = write_jsonl(tmp_path / "answers.jsonl", [{"reply": "x"}])
    with pytest.raises(UserError, match=r"has no column of questions; the columns are reply \(text\)"):
        prepared(tmp_path, rows, f"data.benchmarks=['{answers}']")


def test_the_group_pattern_of_medquad_finds_the_disease(tmp_path: Path) -> None:
    asked = {
        "What is (are) Bartter syndrome ?": "bartter syndrome",
        "What are the symptoms of Bartter syndrome ?": "bartter syndrome",
        "Is Bartter syndrome inherited ?": "bartter syndrome",
        "How many people are affected by Bartter syndrome ?": "bartter syndrome",
        "What are the genetic changes related to Bartter syndrome ?": "bartter syndrome",
        "What are the treatments for Bartter syndrome ?": "bartter syndrome",
        "What causes Bartter syndrome ?": "bartter syndrome",
        "How to diagnose Bartter syndrome ?": "bartter syndrome",
        "How to prevent Bartter syndrome ?": "bartter syndrome",
        "Who is at risk for Bartter syndrome? ?": "bartter syndrome",
        "What is the outlook for Bartter syndrome ?": "bartter syndrome",
        "what research (or clinical trials) is being done for Bartter syndrome ?": "bartter syndrome",
        "Do you have information about Bartter syndrome": "bartter syndrome",
        "What are the complications of Bartter syndrome ?": "bartter syndrome",
    }
    rows = [{"qtype": "x", "Question": q, "Answer": f"{ANSWER} {q}"} for q in asked]
    rows += [
        {"qtype": "x", "Question": f"What causes disease number {n} ?", "Answer": f"{ANSWER} {n}"} for n in range(40)
    ]
    found = prepare(compose("data=medquad", f"data.path='{write_jsonl(tmp_path / 'rows.jsonl', rows)}'").data)
    groups = {c.messages[1]["content"]: c.group for c in everything(found)}
    assert {q: groups[q] for q in asked} == {q: f"medquad {disease}" for q, disease in asked.items()}
    assert len(set(groups.values())) == 41


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(0.1, 0.1), (0.3, 0.2), (8, 5), (0.1, 6)])
def test_added_rows_move_no_old_row(tmp_path: Path, sizes: tuple[float, float]) -> None:
    words = [f"data.validation_size={sizes[0]}", f"data.test_size={sizes[1]}"]
    few, many = prepared(tmp_path, conversations(120), *words), prepared(tmp_path, conversations(400), *words)
    for name in SPLITS:
        old = {c.row for c in getattr(few, name)}
        assert old and old == {c.row for c in getattr(many, name) if c.row <= 120}
    assert few.fingerprint != many.fingerprint


def test_templated_rows_are_decoded_a_few_times_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"group": f"case-{i}"} for i, row in enumerate(conversations(1000))]
    decoded: Counter[int] = Counter()
    plain = ConversationTable.__getitem__

    def counted(self: ConversationTable, place: int) -> Conversation:
        decoded[place] += 1
        return plain(self, place)

    monkeypatch.setattr(ConversationTable, "__getitem__", counted)
    prepared(tmp_path, rows)
    assert len(decoded) == 1000 and decoded.total() <= 5000, "they were 146,536"


def test_sizes_hold_by_share_and_by_count(tmp_path: Path) -> None:
    rows = conversations(1000)
    shares = prepared(tmp_path, rows, "data.validation_size=0.2", "data.test_size=0.1").report["splits"]
    assert list(shares.values()) == [pytest.approx(n, rel=0.2) for n in (700, 200, 100)]
    counts = prepared(tmp_path, rows, "data.validation_size=50", "data.test_size=30").report["splits"]
    assert counts == {"train": 920, "validation": 50, "test": 30}
    short = prepared(tmp_path, rows, "data.test_size=400").report
    assert 200 < short["splits"]["test"] < 300
    assert smaller(short)[0].startswith(f"the test split has {short['splits']['test']} conversations, not 400")


@pytest.mark.parametrize("validation_size", [0.1, 20, 1])
def test_a_test_size_of_1_is_all_of_it(tmp_path: Path, validation_size: float) -> None:
    data = local(write_jsonl(tmp_path / "rows.jsonl", conversations(100)))
    found = prepare(replace(data, validation_size=validation_size, test_size=1.0)).report
    assert found["splits"] == {"train": 0, "validation": 0, "test": 100}
    assert found["leakage"]["held_out"] == 100 and found["leakage"]["groups"] == 0 and not smaller(found)


def test_a_count_is_exact_though_groups_are_never_cut(tmp_path: Path) -> None:
    rows = [row | {"group": f"patient {i % 150}", "source": "abc"[i % 3]} for i, row in enumerate(conversations(900))]
    found = prepared(tmp_path, rows, "data.validation_size=40", "data.test_size=20")
    assert (found.report["splits"]["validation"], found.report["splits"]["test"]) == (40, 20)
    assert set(rejected(found).values()) == {"split_size"} and found.report["leakage"]["groups"] == 0


def test_splits_are_stratified_by_source(tmp_path: Path) -> None:
    rows = [row | {"source": "a" if i % 5 else "b"} for i, row in enumerate(conversations(1000))]
    by_share = prepared(tmp_path, rows, "data.validation_size=0.2").report["by_source"]
    assert by_share["local/a"]["validation"] / 800 == pytest.approx(by_share["local/b"]["validation"] / 200, rel=0.35)
    by_count = mixture(tmp_path, "data.validation_size=21", "data.test_size=8").report
    assert {name: sizes["validation"] for name, sizes in by_count["by_source"].items()} == {"a": 11, "b": 10}
    assert by_count["splits"]["test"] == 8


def test_one_group_that_holds_everything_and_an_empty_split(tmp_path: Path) -> None:
    rows = [row | {"group": "the same"} for row in conversations(40)]
    with pytest.raises(UserError, match=r"split is empty: 40 conversations in 1 groups, and groups are never cut"):
        prepared(tmp_path, rows, "data.columns.group=group")


def test_a_leak_is_counted_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in assigning splits, the report looks at the result alone."""
    rows = [
        said(f"What could be the reason for my {'very ' * (i // 2)}itchy elbow?", f"{ANSWER} {i}", group=str(i))
        for i in range(40)
    ]

    def careless(*args: Any) -> Any:
        selection = pipeline_select(*args)
        selection.splits[:] = np.arange(len(selection.splits)) % 3
        selection.left_out.clear()
        selection.groups[:] = ["one"] * len(selection.groups)
        return selection

    pipeline_select = pipeline.select
    monkeypatch.setattr(pipeline, "select", careless)
    with pytest.raises(
        UserError, match=r"of the held-out questions stand in another split too \(as row \d+ and row \d+"
    ):
        prepared(tmp_path, rows)
    report = prepared(tmp_path, rows, "data.max_leakage=1").report["leakage"]
    assert report["groups"] == report["held_out"] and report["exact_questions"] > 0


def test_leakage_of_a_known_split() -> None:
    texts = ["Is it bad to have a dry cough all night long for a week when nobody else at home has it?"] * 2
    texts += [texts[0].replace("dry", "wet"), "Can I fly with a cold?", "Why do my knees crack?"]
    bands = minhash_bands([pairs_of(text.lower().strip("?").split()) for text in texts])
    question = np.array([1, 1, 2, 3, 4], np.uint64)
    found = leakage(
        np.array([0, 1, 2, 1, 0], np.int8), question, ["a", "a", "b", "c", "d"], bands, texts.__getitem__, 0.5
    )
    assert (found.held_out, found.exact_questions, found.near_questions, found.groups) == (3, 1, 1, 1)
    assert found.share == pytest.approx(2 / 3)


def test_near_duplicates_are_found_among_many(tmp_path: Path) -> None:
    """What MinHash finds is what comparing every pair finds."""
    texts = [row["messages"][0]["content"] for row in map(json.loads, BUNDLED.read_text(encoding="utf-8").splitlines())]
    texts += [f"Please help me. {text} Thank you." for text in texts if len(text) > 200]
    found = near_duplicates(
        minhash_bands([pairs_of(re.findall(r"\w+", t.lower())) for t in texts]),
        np.arange(len(texts)),
        texts.__getitem__,
    )
    pairs = {(later, earlier) for later, others in found.items() for earlier in others}
    expected = {(i, j) for i in range(len(texts)) for j in range(i) if jaccard(texts[i], texts[j]) >= 0.8}
    assert len(expected) > 100 and len(pairs & expected) >= 0.99 * len(expected) and pairs <= expected


# --- mixtures ---------------------------------------------------------------------------------------------------------


def mixture(tmp_path: Path, *overrides: str) -> PreparedData:
    """Two files of 200 rows; every fourth row of the second stands in the first too."""
    rows = conversations(350)
    write_jsonl(tmp_path / "a.jsonl", rows[:200])
    write_jsonl(tmp_path / "b.jsonl", rows[200:] + [row | {"group": "other"} for row in rows[:200:4]])
    members = [
        f"~data.members.{name}"
        for name in ("consultations", "ai_medical_chatbot", "healthcaremagic", "icliniq", "medquad")
    ]
    for name in "ab":
        members += [
            f"+data@data.members.{name}=local",
            f"data.members.{name}.path='{tmp_path / name}.jsonl'",
            f"data.members.{name}.name={name}",
        ]
    return prepare(compose("data=mix", *members, *overrides).data)


def test_a_mixture_finds_duplicates_across_its_sources(tmp_path: Path) -> None:
    report = (found := mixture(tmp_path)).report
    assert report["funnel"] == {"read": 400, "duplicates": 50, "kept": 350}
    rejects = [json.loads(line) for line in found.rejects.read_text().splitlines()]
    assert all(reject["source"] == "b" and reject["reason"].endswith(" of a") for reject in rejects)
    assert {name: sum(sizes.values()) for name, sizes in report["by_source"].items()} == {"a": 200, "b": 150}


def test_weights_and_limits_of_a_mixture(tmp_path: Path) -> None:
    whole = mixture(tmp_path)
    assert (
        mixture(tmp_path, "data.members.a.max_conversations=60").report["by_source"]["a"]
        != whole.report["by_source"]["a"]
    )
    limited = mixture(tmp_path, "data.members.a.max_conversations=60").report
    assert sum(limited["by_source"]["a"].values()) == 60 and limited["funnel"]["max_conversations"] == 140
    half = mixture(tmp_path, "data.members.b.weight=0.5")
    train, before = (Counter(c.source for c in found.train) for found in (half, whole))
    assert train["a"] == before["a"] and train["b"] == pytest.approx(before["b"] / 2, rel=0.25)
    assert list(half.validation) == list(whole.validation) and list(half.test) == list(whole.test)
    often = mixture(tmp_path, "data.members.b.weight=2.5")
    assert often.report["train_rows"] == len(often.train) > often.report["splits"]["train"] == len(whole.train)
    assert Counter(c.source for c in often.train)["b"] == pytest.approx(2.5 * before["b"], rel=0.05)
    assert {c.row for c in often.train} == {c.row for c in whole.train} and list(often.test) == list(whole.test)


# --- cache, streams, workers ------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", conversations(60))
    first = prepare(local(path))
    calls = []
    monkeypatch.setattr(pipeline, "screen_all", lambda *args: calls.append(args))
    again = prepare(local(path))
    assert calls == [] and again.fingerprint == first.fingerprint and list(again.train) == list(first.train)
    copy = write_jsonl(tmp_path / "elsewhere.jsonl", conversations(60))
    prepare(local(copy))
    assert calls == [], "a set is known by its content, not by its name"


@pytest.mark.parametrize(
    "change", ["data.rules.titles=false", "data.redflag=keep", "data.test_size=0.2", "rows", "criteria"]
)
def test_any_change_prepares_anew(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", conversations(60))
    before = prepare(local(path)).rejects.parent
    if change == "criteria":
        monkeypatch.setattr(Path, "rglob", lambda folder, pattern: iter([write_jsonl(tmp_path / "redflags.yaml", [])]))
    write_jsonl(path, conversations(61 if change == "rows" else 60))
    assert prepare(local(path, *[change] * ("=" in change))).rejects.parent != before


def test_a_refused_set_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        prepared(tmp_path, [row | {"group": "the same"} for row in conversations(40)], "data.columns.group=group")
    with pytest.raises(UserError):
        prepared(tmp_path, [row | {"group": "the same"} for row in conversations(40)], "data.columns.group=group")


def test_workers_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*conversations(300), {"messages": []}, *conversations(20)]
    alone = prepared(tmp_path, rows)
    monkeypatch.setattr(pipeline, "ALONE", 100)
    monkeypatch.setattr(pipeline, "CHUNK", 50)
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "other"))
    together = prepared(tmp_path, rows)
    assert together.fingerprint == alone.fingerprint and together.report == alone.report
    assert together.rejects.read_text() == alone.rejects.read_text()


def test_what_was_prepared_once_changes_no_more(tmp_path: Path) -> None:
    rows = [
        said(f"<p>I&nbsp;have a cough since {n} days .</p>", f"Hello. {ANSWER} {n} http://x.org/{n}") for n in range(60)
    ]
    once = prepared(tmp_path, rows)
    assert once.report["changed"]
    again = prepared(tmp_path, [{"messages": c.messages, "group": c.group} for c in everything(once)])
    assert again.report["changed"] == {} and again.report["funnel"] == {"read": 60, "kept": 60}


def test_templated_questions_lose_rows_rather_than_leak(tmp_path: Path) -> None:
    """A band of hundreds of questions that differ in one word: more than are compared at first."""
    words = "Please tell me in simple words what every patient should know about daily life with {} at home or at work?"
    rows = [said(words.format(f"disease{n}"), f"{ANSWER} {n} {n * n}", group=str(n)) for n in range(400)]
    report = prepared(tmp_path, [*conversations(80), *rows]).report
    assert report["leakage"]["near_questions"] == report["leakage"]["exact_questions"] == 0
    assert report["funnel"]["leaks"] > 10


def test_contacts_are_redacted_in_rejects_too(tmp_path: Path) -> None:
    found = prepared(tmp_path, [*conversations(40), said("Mail jane.roe@example.org please, will you?", "No.")])
    assert rejected(found) == {41: "short"} and "[email]" in found.rejects.read_text()
    assert "jane.roe" not in found.rejects.read_text()


def test_reporting_red_flags_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chest = "I have crushing chest pain that spreads to my left arm and I am sweating."
    for policy, warned in (("report", True), ("keep", False)):
        caplog.clear()
        log_report(prepared(tmp_path, [*conversations(40), said(chest, ANSWER)], f"data.redflag={policy}").report)
        assert ("1 emergencies are trained on with an answer that misses them" in caplog.text) is warned


def test_every_split_is_as_large_as_the_report_says(tmp_path: Path) -> None:
    found = prepared(tmp_path, conversations(80))
    assert {name: len(getattr(found, name)) for name in SPLITS} == found.report["splits"]
    assert found.train[0] == next(iter(found.train)) and found.train[:2] == list(found.train)[:2]
    assert found.train[-1] == list(found.train)[-1] and SPLITS.index("train") == TRAIN
    with pytest.raises(IndexError):
        found.train[len(found.train)]


def test_rows_go_where_they_say(tmp_path: Path) -> None:
    rows = conversations(60)
    marks = ["train"] * 30 + ["test"] * 20 + [""] * 10
    path = write_jsonl(tmp_path / "rows.jsonl", [row | {"split": mark} for row, mark in zip(rows, marks, strict=True)])
    found = prepare(compose("data=local", f"data.path='{path}'", "data.test_size=0.5").data)
    assert {row.row for row in found.test} == set(range(31, 51)), "these, whatever data.test_size is"
    assert len(found.validation) > 0 and found.report["marked"] == ["test", "train"]
    everything = prepare(replace(local(path), test_size=1))
    assert len(everything.test) == 60


def test_a_group_that_is_marked_for_two_splits_is_in_one(tmp_path: Path) -> None:
    rows = [row | {"split": "train", "group": f"g{number}"} for number, row in enumerate(conversations(40))]
    rows[0]["group"] = rows[39]["group"] = "both"
    rows[39]["split"] = rows[38]["split"] = "test"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = prepare(compose("data=local", f"data.path='{path}'").data)
    assert [row.row for row in found.test] == [39]
    left_out = [json.loads(line) for line in found.rejects.read_text().splitlines()]
    assert [(row["row"], row["rule"]) for row in left_out] == [(40, "leaks")]


def test_answers_of_weight_0_stay_so_in_what_is_written_out(tmp_path: Path) -> None:
    rows = conversations(40)
    marked = [{"role": "user", "content": "Is tea good?"}, {"role": "assistant", "content": "Twelve.", "weight": 0}]
    rows[0] = {
        "messages": [*marked, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Rest."}]
    }
    found, written = prepared(tmp_path, rows, "data.rules.titles=false"), []
    for split in SPLITS:
        write_parquet(getattr(found, split), tmp_path / f"{split}.parquet")
        written += pq.read_table(tmp_path / f"{split}.parquet").to_pylist()
    (first,) = (row["messages"] for row in written if row["row"] == 1)
    assert [message["weight"] for message in first if message["role"] == "assistant"] == [0, None]
