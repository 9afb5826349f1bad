"""Scores, safety and benchmarks of evaluated members -> tables beside the base model."""

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from medtune.results.comparison import format_interval
from medtune.results.layout import SHORTEST_NAME, side_by_side, wrapped
from medtune.results.metrics import METRICS, perplexity
from medtune.results.reader import RunResult
from medtune.runtime.progress import shorten

COMPARED = 4  # members of which all scores are shown
PERCENT = ("token_accuracy", "contradicted", "repetition", "boilerplate", "ended")


def scores_table(tested: Sequence[RunResult]) -> str:
    """Returns every metric of base model and members, with its floor below it, and another doctor where there
    is one.
    """
    ranked = sorted(tested, key=lambda member: member.eval_loss)
    if not ranked:
        return ""
    same = [member for member in ranked if asked_of(member) == asked_of(ranked[0])]
    compared = same[:COMPARED]
    base, adapted = compared[0].test["base"]["scores"], [member for member in compared if "tuned" in member.test]
    ceilings = any("ceiling" in numbers for numbers in base.values())
    columns = [["base model", *base_cells(base)], *([member.name, *score_cells(member, base)] for member in adapted)]
    if ceilings:
        columns.insert(1, ["doctor", *ceiling_cells(base)])
    note = (
        f"{compared[0].test['answered']} answers; + better, - worse than the base model (95 %, paired, each on its own)"
    )
    note += "\nshuffled: the same answers given to other questions" + ("; doctor: another's answer" if ceilings else "")
    if len(compared) < len(tested):
        note += f"\nshown are the best {len(compared)} by validation that were asked the same, on the same base model; "
        note += "all are in metrics.json"
    return side_by_side([["test set", *row_titles(base)]], columns, 1 + ceilings) + "\n" + wrapped(note)


def asked_of(member: RunResult) -> tuple[str, str]:
    """Returns what a member was asked, and on which base model: scores compare where both are the same."""
    return member.test["examination"], member.run.get("base", {}).get("fingerprint", "")


def row_titles(base: dict[str, Any]) -> list[str]:
    """Returns the titles of the rows: each metric, and its floor where it has one."""
    titles = []
    for name, metric in METRICS.items():
        if name in base:
            arrow = {True: "↑", False: "↓", None: " "}[metric.higher_is_better]
            titles += [f"{metric.title} {arrow}", *(["  shuffled"] if "floor" in base[name] else [])]
    return titles


def base_cells(base: dict[str, Any]) -> list[str]:
    """Returns the base model's cells, floors included."""
    cells = []
    for name in METRICS:
        if name in base:
            cells += [cell(name, base[name]), *([bound(name, base[name], "floor")] if "floor" in base[name] else [])]
    return cells


def ceiling_cells(base: dict[str, Any]) -> list[str]:
    """Returns the cells of another doctor."""
    cells = []
    for name in METRICS:
        if name in base:
            cells += [bound(name, base[name], "ceiling"), *([""] if "floor" in base[name] else [])]
    return cells


def score_cells(member: RunResult, base: dict[str, Any]) -> list[str]:
    """Returns a member's cells, each marked where it is clearly better or worse than the base model."""
    cells = []
    for name in METRICS:
        if name in base:
            numbers = member.test["tuned"]["scores"][name]
            verdict = member.test["difference"].get(name, {}).get("verdict", "")
            mark = {"better": " +", "worse": " -"}.get(verdict, "")
            cells += [cell(name, numbers) + mark, *([bound(name, numbers, "floor")] if "floor" in base[name] else [])]
    return cells


def cell(name: str, numbers: dict[str, Any]) -> str:
    """Returns a mean with its interval, as its metric is read."""
    if name == "base_nll":
        numbers = {k: None if numbers[k] is None else perplexity(numbers[k]) for k in ("value", "low", "high")}
        return format_interval(numbers, ".1f")
    form = ".1f" if name in ("chrf", "bleu") else ".3f"
    return format_interval(numbers, ".1%" if name in PERCENT else form)


def bound(name: str, numbers: dict[str, Any], which: str) -> str:
    """Returns a floor or a ceiling, without an interval."""
    return cell(name, {"value": numbers[which], "low": None, "high": None}) if which in numbers else ""


def safety_table(tested: Sequence[RunResult]) -> str:
    """Returns a table by category: how many answers of how many did what they should."""
    ranked = sorted(tested, key=lambda member: member.eval_loss)
    compared = [member for member in ranked if "safety" in member.test["base"]][:COMPARED]
    if not compared:
        return ""
    base = compared[0].test["base"]["safety"]
    titles = [
        ["safety set", *(category.replace("_", " ") for category in base), "any", "any"],
        ["expected", *(row["expected"].replace("_", " ") for row in base.values()), "no dose", "no invented"],
    ]
    columns = [["base model", *safety_cells(base)]]
    for member in compared:
        if "tuned" in member.test:
            columns.append([member.name, *safety_cells(member.test["tuned"]["safety"])])
    return side_by_side(titles, columns, 1)


def safety_cells(tally: dict[str, Any]) -> list[str]:
    """Returns a model's cells: each category, then doses and inventions over all of them."""
    total = sum(row["of"] for row in tally.values())
    counts = [sum(row[what] for row in tally.values()) for what in ("doses", "invented")]
    return [*(share(row, "passed") for row in tally.values()), *(f"{total - count}/{total}" for count in counts)]


def share(row: dict[str, Any], what: str) -> str:
    """Returns a share, as 7/12 (32 to 81 %)."""
    low, high = row["interval"]
    return f"{row[what]}/{row['of']} ({100 * low:.0f} to {100 * high:.0f} %)"


def benchmarks_table(tested: Sequence[RunResult]) -> str:
    """Returns accuracy in each task: base model and adapters, with the verdict of the paired difference."""
    rows = []
    for member in tested:
        for task, numbers in member.test.get("benchmarks", {}).items():
            values = [f"{numbers[name]['value']:.1%}" for name in ("base", "tuned") if name in numbers]
            verdict = numbers.get("difference", {}).get("verdict", "")
            about = [numbers["base"]["metric"], numbers["base"]["examples"]]
            rows.append([shorten(member.name, 2 * SHORTEST_NAME), task, *about, *values, verdict])
    headers = ["member", "benchmark", "metric", "questions", "base model", "adapter", "vs base"]
    return tabulate(rows, headers, disable_numparse=True) if rows else ""


def rubric(test: dict[str, Any]) -> str:
    """Returns how far the rubric agrees with answers that were labelled by hand."""
    rows = []
    for group in ("categories", "criteria"):
        for name, c in test["rubric"][group].items():
            right, of = c["true_yes"] + c["true_no"], sum(c.values())
            rows.append([name.replace("_", " "), of, f"{right / of:.0%}", *c.values()])
    headers = ["rubric and hand labels", "answers", "agree", "both yes", "rubric", "label", "both no"]
    return tabulate(rows, headers) + "\n" + wrapped(test["rubric"]["says"])
