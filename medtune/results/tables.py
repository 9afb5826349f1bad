"""Result folders -> tables: members beside the untuned base, with intervals, paired verdicts, safety and the gate.

Everything is read from the folders' files; nothing is measured here.
"""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from medtune.results.comparison import format_interval, verdicts
from medtune.results.metrics import METRICS, perplexity
from medtune.results.reader import RunResult
from medtune.runtime.files import display_path

NOTHING = "(an empty answer)"
BESIDE = 4  # members whose numbers fit beside each other on a screen
PERCENT = ("token_accuracy", "contradicted", "repetition", "boilerplate", "ended")


def summary(folders: Sequence[Path]) -> str:
    """What the user sees at the end of training: the members, the verdicts, answers to read."""
    members = [RunResult(folder, folder) for folder in folders]
    parts = [members_table(members), *verdicts(members), gates(members), answers(members)]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def everything(members: Sequence[RunResult]) -> str:
    """What the user sees at the end of an evaluation: all of it."""
    tested = [member for member in members if member.test]
    parts = [
        members_table(members),
        *verdicts(members),
        scores_table(tested),
        safety_table(tested),
        *reasons(members),
        benchmarks_table(tested),
    ]
    parts += [rubric(member.test) for member in tested if "rubric" in member.test][:1]
    parts += [costs(tested)]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def members_table(members: Sequence[RunResult]) -> str:
    """Base and members: validation and test loss, and where the adapter is."""
    bases: list[list[Any]] = []
    rows: list[list[Any]] = []
    for member in members:
        best, base, run = member.metrics.get("best", {}), member.metrics.get("base", {}), member.run
        untuned = member.test.get("base", {}).get("scores", {}).get("loss")
        bases.append(
            ["untuned base", base.get("eval_loss"), base.get("perplexity"), format_interval(untuned), "", None, "", ""]
        )
        if not run and member.test:
            continue  # a base that was measured alone
        status, minutes = run.get("status", "not started"), run["seconds"] / 60 if "seconds" in run else None
        where = display_path(member.folder / "adapter") if status == "done" else run.get("error") or ""
        loss = format_interval(member.test.get("tuned", {}).get("scores", {}).get("loss"))
        verdict = member.test.get("difference", {}).get("loss", {}).get("verdict", "")
        rows.append([member.name, best.get("eval_loss"), best.get("perplexity"), loss, verdict, minutes, status, where])
    headers = ["member", "eval_loss", "perplexity", "test_loss (95 %)", "than base", "minutes", "status", "adapter"]
    shared = [row for row in bases if row[1] is not None or row[3]][:1]
    return tabulate(shared + rows, headers, floatfmt=("", ".4f", ".2f", "", "", ".1f"), missingval="-")


def scores_table(tested: Sequence[RunResult]) -> str:
    """Every metric of base and members, with the floor of each below it, and another doctor where there is one."""
    ranked = sorted(tested, key=lambda member: member.eval_loss)
    if not ranked:
        return ""
    beside = [member for member in ranked if member.test["examination"] == ranked[0].test["examination"]][:BESIDE]
    base, adapted = beside[0].test["base"]["scores"], [member for member in beside if "tuned" in member.test]
    ceilings = any("ceiling" in numbers for numbers in base.values())
    rows = []
    for name, metric in METRICS.items():
        if name not in base:
            continue
        arrow = {True: "↑", False: "↓", None: " "}[metric.higher_is_better]
        row = [f"{metric.title} {arrow}", cell(name, base[name])]
        for member in adapted:
            word = member.test["difference"].get(name, {}).get("verdict", "")
            mark = {"better": " +", "worse": " -"}.get(word, "")
            row.append(cell(name, member.test["tuned"]["scores"][name]) + mark)
        rows.append([*row, bound(name, base[name], "ceiling")] if ceilings else row)
        if "floor" in base[name]:
            floors = [base[name], *(member.test["tuned"]["scores"][name] for member in adapted)]
            rows.append(["  shuffled", *(bound(name, numbers, "floor") for numbers in floors)])
    headers = ["test set", "untuned base", *(member.name for member in adapted)]
    note = f"{beside[0].test['answered']} answers; + better, - worse than the base (95 %, paired, each on its own)\n"
    note += "shuffled: the same answers given to other questions" + ("; doctor: another's answer" if ceilings else "")
    if len(beside) < len(tested):
        note += f"\nshown are the best {len(beside)} by validation that were asked the same; all are in metrics.json"
    return tabulate(rows, [*headers, "doctor"] if ceilings else headers, disable_numparse=True) + f"\n{note}"


def cell(name: str, numbers: dict[str, Any]) -> str:
    """A mean with its interval, as its metric is read."""
    if name == "base_nll":
        numbers = {k: None if numbers[k] is None else perplexity(numbers[k]) for k in ("value", "low", "high")}
        return format_interval(numbers, ".1f")
    return format_interval(numbers, ".1%" if name in PERCENT else ".1f" if name in ("chrf", "bleu") else ".3f")


def bound(name: str, numbers: dict[str, Any], which: str) -> str:
    """A floor or a ceiling, without an interval."""
    return cell(name, {"value": numbers[which], "low": None, "high": None}) if which in numbers else ""


def safety_table(tested: Sequence[RunResult]) -> str:
    """By category: how many answers of how many did what they should."""
    beside = [member for member in sorted(tested, key=lambda m: m.eval_loss) if "safety" in member.test["base"]][
        :BESIDE
    ]
    if not beside:
        return ""
    columns = [beside[0].test["base"]["safety"], *(m.test["tuned"]["safety"] for m in beside if "tuned" in m.test)]
    rows = [
        [
            category.replace("_", " "),
            row["expected"].replace("_", " "),
            *(share(c[category], "passed") for c in columns),
        ]
        for category, row in columns[0].items()
    ]
    for title, what in (("any", "doses"), ("any", "invented")):
        counted = [(sum(row[what] for row in c.values()), sum(row["of"] for row in c.values())) for c in columns]
        rows.append(
            [title, f"no {what}" if what == "invented" else "no dose", *(f"{of - n}/{of}" for n, of in counted)]
        )
    headers = ["safety set", "expected", "untuned base", *(member.name for member in beside if "tuned" in member.test)]
    return tabulate(rows, headers, disable_numparse=True)


def share(row: dict[str, Any], what: str) -> str:
    """7/12 (32 to 81 %)."""
    low, high = row["interval"]
    return f"{row[what]}/{row['of']} ({100 * low:.0f} to {100 * high:.0f} %)"


def gates(members: Sequence[RunResult]) -> str:
    """Whether each adapter may be shown to anyone, in a line each."""
    lines = []
    for member in members:
        if verdict := member.test.get("gate"):
            why = "" if verdict["passed"] else f" ({len(verdict['reasons'])} reasons: {verdict['reasons'][0]}; …)"
            lines.append(f"safety gate, {member.name}: {'passed' if verdict['passed'] else 'not passed'}{why}")
    if not lines:
        return ""
    folder = members[0].folder if len(members) == 1 else members[0].folder.parent
    return "\n".join(
        [*lines, f"scores, safety by category and reasons: python -m medtune.evaluate run={display_path(folder)}"]
    )


def reasons(members: Sequence[RunResult]) -> Iterator[str]:
    """Whether each adapter may be shown to anyone, and every reason why not."""
    for member in members:
        if verdict := member.test.get("gate"):
            lines = [f"safety gate, {member.name}: {'passed' if verdict['passed'] else 'not passed'}"]
            lines[0] += (
                f" ({verdict['cut_answers']} answers were cut at {verdict['max_new_tokens']} tokens; not gated: "
            )
            lines[0] += ", ".join(name.replace("_", " ") for name in verdict["not_gated"]) + ")"
            yield "\n".join([*lines, *(f"  {reason}" for reason in verdict["reasons"])])


def benchmarks_table(tested: Sequence[RunResult]) -> str:
    """Accuracy in each task: base and adapters, + and - where the paired difference is clear."""
    rows = []
    for member in tested:
        for task, numbers in member.test.get("benchmarks", {}).items():
            shown_numbers = [f"{numbers[name]['value']:.1%}" for name in ("base", "tuned") if name in numbers]
            word = numbers.get("difference", {}).get("verdict", "")
            rows.append(
                [member.name, task, numbers["base"]["metric"], numbers["base"]["examples"], *shown_numbers, word]
            )
    headers = ["member", "benchmark", "metric", "questions", "untuned base", "adapter", "than base"]
    return tabulate(rows, headers, disable_numparse=True) if rows else ""


def rubric(test: dict[str, Any]) -> str:
    """How far the rubric agrees with answers that were labelled by hand."""
    rows = []
    for group in ("categories", "criteria"):
        for name, c in test["rubric"][group].items():
            right, of = c["true_yes"] + c["true_no"], sum(c.values())
            rows.append([name.replace("_", " "), of, f"{right / of:.0%}", *c.values()])
    headers = ["rubric and hand labels", "answers", "agree", "both yes", "rubric only", "label only", "both no"]
    return tabulate(rows, headers) + f"\n{test['rubric']['says']}"


def costs(tested: Sequence[RunResult]) -> str:
    """How often the test set was read, and what the measuring took."""
    lines = []
    for member in tested:
        seconds = {name: sum(parts.values()) for name, parts in member.test["seconds"].items()}
        took = (
            ", ".join(f"{name} {value / 60:.1f} min" for name, value in seconds.items() if value) or "all stored before"
        )
        times = {1: "once"}.get(member.test["reads"], f"{member.test['reads']} times")
        lines.append(f"{member.name}: test set read {times}; measuring took: {took}; {display_path(member.results)}")
    return "\n".join(lines)


def answers(members: Sequence[RunResult]) -> str:
    """The first prompt, and what the base and each member's best adapter answered to it."""
    lines: list[str] = []
    for member in members:
        if "best" not in member.metrics:
            continue
        text = (member.folder / "samples.jsonl").read_text(encoding="utf-8")
        samples = [json.loads(line) for line in text.splitlines()]
        prompt = samples[0]["prompt"]
        asked = {row["step"]: row["answer"] for row in reversed(samples) if row["prompt"] == prompt}
        if not lines:
            lines = [f"Patient: {prompt}", f"untuned base: {asked[0] or NOTHING}"]
        if member.metrics["best"]["step"] in asked:  # unless it was interrupted before it had answered
            lines.append(f"{member.name}: {asked[member.metrics['best']['step']] or NOTHING}")
    return "\n\n".join(textwrap.fill(line, 118, replace_whitespace=False) for line in lines)
