"""Intervals that cover what they should, differences that are paired, and a word for each outcome."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtune.results.statistics import Bootstrap, Estimate, student_t_quantile


def groups(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    found = Bootstrap(groups(400), 10_000).ratio(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean()) and found.count == 400
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_groups_are_drawn_whole() -> None:
    """Ten copies of each example are no more evidence than one."""
    values = np.random.default_rng(2).normal(0.0, 1.0, 50)
    once = Bootstrap(groups(50), 4000).ratio(values)
    copies = Bootstrap([g for g in groups(50) for _ in range(10)], 4000).ratio(np.repeat(values, 10))
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high), abs=1e-9)


def test_a_ratio_weighs_by_tokens() -> None:
    nll, tokens = np.array([10.0, 1.0]), np.array([10.0, 4.0])
    assert Bootstrap(["a", "b"], 100).ratio(nll, tokens).value == pytest.approx(11 / 14)


def test_pairing_sees_what_two_intervals_hide() -> None:
    dice = np.random.default_rng(3)
    theirs = dice.normal(0.0, 1.0, 60)
    ours = theirs + dice.normal(0.05, 0.02, 60)
    bootstrap = Bootstrap(groups(60), 2000)
    a, b = bootstrap.ratio(ours), bootstrap.ratio(theirs)
    assert a.low < b.high and b.low < a.high, "the two intervals overlap"
    change = bootstrap.difference(ours, theirs)
    assert change.verdict(higher_is_better=True) == "better" and change.verdict(higher_is_better=False) == "worse"
    assert bootstrap.difference(theirs, theirs).verdict(True) == "not distinguishable"


@pytest.mark.parametrize(("count", "least"), [(5, 0.89), (13, 0.92), (60, 0.92)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(count: int, least: float) -> None:
    dice = np.random.default_rng(4)
    hits = 0
    for seed in range(600):
        found = Bootstrap(groups(count), 400, seed).ratio(dice.normal(1.0, 1.0, count))
        hits += found.low <= 1.0 <= found.high
    assert least <= hits / 600 <= 0.98


def test_what_is_no_number_is_left_out_and_counted() -> None:
    found = Bootstrap(groups(4), 200).ratio(np.array([1.0, np.nan, 3.0, np.nan]))
    assert (found.value, found.count) == (2.0, 2)
    both = Bootstrap(groups(3), 200).difference(np.array([1.0, 2.0, np.nan]), np.array([np.nan, 1.0, 1.0]))
    assert (both.value, both.count) == (1.0, 1)
    nothing = Bootstrap(groups(2), 200).ratio(np.array([np.nan, np.nan]))
    assert np.isnan([nothing.value, nothing.low]).all() and nothing.verdict(True) == "not distinguishable"


def test_a_handful_of_groups_has_no_interval() -> None:
    found = Bootstrap(["a", "b", "c", "d", "d"], 200).ratio(np.array([1.0, 2.0, 1.0, 2.0, 1.5]))
    assert found.value == 1.5 and np.isnan([found.low, found.high]).all()
    assert found.verdict(True) == "not distinguishable"


def test_students_t() -> None:
    # Tables: 4 -> 2.776, 12 -> 2.179, 59 -> 2.001
    assert [student_t_quantile(freedom) for freedom in (4, 12, 59)] == pytest.approx([2.776, 2.179, 2.001], abs=0.01)


def test_the_same_seed_gives_the_same_interval_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(20.0)
    first = Bootstrap(groups(20), 1000).ratio(values)
    monkeypatch.setattr("medtune.results.statistics.CHUNK", 100)
    assert Bootstrap(groups(20), 1000).ratio(values) == first
    assert Bootstrap(groups(20), 1000, seed=1).ratio(values) != first


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 5)), min_size=1, max_size=40))
def test_an_interval_lies_among_its_values(rows: list[tuple[float, int]]) -> None:
    values, names = np.array([value for value, _ in rows]), [str(group) for _, group in rows]
    found = Bootstrap(names, 200).ratio(values)
    if not np.isnan(found.low):
        assert found.low <= found.high
        assert values.min() - 1e-6 <= found.low and found.high <= values.max() + 1e-6


def test_verdicts() -> None:
    assert Estimate(-0.1, -0.2, -0.01, 9).verdict(higher_is_better=False) == "better"
    assert Estimate(-0.1, -0.2, 0.01, 9).verdict(higher_is_better=False) == "not distinguishable"
