"""Result folders -> tables: members beside the base model, with intervals, paired verdicts, safety and the gate.

Everything is read from the folders' files; nothing is evaluated here. Tables fit the terminal, from 80 columns on: long
names are shortened in the middle, and columns that do not fit beside each other come in a table of their own.
"""

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tabulate as tables_library
from tabulate import tabulate

from medtune.results.comparison import NAME_IN_TEXT, format_interval, verdicts
from medtune.results.metrics import METRICS, perplexity
from medtune.results.reader import RunResult
from medtune.runtime.files import display_path
from medtune.runtime.progress import shorten

tables_library.MIN_PADDING = 0  # headers need no room beside them

NOTHING = "(an empty answer)"
COMPARED = 4  # members of which all scores are shown
NARROWEST, WITHOUT_TERMINAL = 80, 120  # columns
SHORTEST_NAME = 12  # characters
SEPARATOR = 2  # characters between two columns
PERCENT = ("token_accuracy", "contradicted", "repetition", "boilerplate", "ended")


def summary(folders: Sequence[Path]) -> str:
    """Returns what stands at the end of training: the members, the verdicts, answers to read."""
    members = name_run_alone([RunResult(folder, folder) for folder in folders])
    parts = [members_table(members), *map(wrapped, verdicts(members)), gates(members), answers(members)]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def everything(members: Sequence[RunResult]) -> str:
    """Returns what stands at the end of an evaluation: all of it."""
    members = name_run_alone(members)
    tested = [member for member in members if member.test]
    parts = [
        members_table(members),
        *map(wrapped, verdicts(members)),
        scores_table(tested),
        safety_table(tested),
        *map(wrapped, reasons(members)),
        benchmarks_table(tested),
    ]
    parts += [rubric(member.test) for member in tested if "rubric" in member.test][:1]
    parts += [costs(tested)]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def name_run_alone(members: Sequence[RunResult]) -> Sequence[RunResult]:
    """Calls a run that belongs to no sweep by its own name; its folder is named by all of its overrides."""
    if len(members) == 1 and not (members[0].folder.parent / "sweep.json").exists():
        members[0].title = members[0].run.get("name", "")
    return members


def named(member: RunResult) -> str:
    """A member's name as it stands in a line of text."""
    return shorten(member.name, NAME_IN_TEXT)


def screen_width() -> int:
    """The columns that tables may take."""
    return max(shutil.get_terminal_size((WITHOUT_TERMINAL, 24)).columns, NARROWEST)


def wrapped(text: str) -> str:
    """Text with lines that fit the screen, broken between words and indented as they were."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(
            line, screen_width(), initial_indent="", subsequent_indent=indent + "  ", break_long_words=False,
            break_on_hyphens=False,
        ) or [""]  # fmt: skip
    return "\n".join(lines)


def members_table(members: Sequence[RunResult]) -> str:
    """Base model and members: validation and test loss, verdict, time, status; below it adapters and errors."""
    bases = [row for row in map(base_row, members) if row["eval_loss"] != "-" or row["test_loss (95 %)"]]
    trained = [member for member in members if member.run or not member.test]  # others are base models alone
    rows = bases[:1] + [member_row(member) for member in trained]
    lines = [fitted(rows)]
    lines += [wrapped(f"{named(member)}: {member.run['error']}") for member in trained if member.run.get("error")]
    lines += adapters_line([member for member in trained if member.run.get("status") == "done"])
    return "\n".join(lines)


def base_row(member: RunResult) -> dict[str, str]:
    """The row of the base model that a member was trained on."""
    base, scores = member.metrics.get("base", {}), member.test.get("base", {}).get("scores", {})
    return {
        "member": "base model",
        "eval_loss": number(base.get("eval_loss"), ".4f"),
        "perplexity": number(base.get("perplexity"), ".2f"),
        "test_loss (95 %)": format_interval(scores.get("loss")),
        "vs base": "",
        "minutes": "",
        "status": "",
    }


def member_row(member: RunResult) -> dict[str, str]:
    """The row of a member."""
    best, run = member.metrics.get("best", {}), member.run
    verdict = member.test.get("difference", {}).get("loss", {}).get("verdict", "")
    return {
        "member": member.name,
        "eval_loss": number(best.get("eval_loss"), ".4f"),
        "perplexity": number(best.get("perplexity"), ".2f"),
        "test_loss (95 %)": format_interval(member.test.get("tuned", {}).get("scores", {}).get("loss")),
        "vs base": "unclear" if verdict.startswith("not") else verdict,
        "minutes": number(run["seconds"] / 60 if "seconds" in run else None, ".1f"),
        "status": run.get("status", "not started"),
    }


def number(value: float | None, form: str) -> str:
    """A number in the given format; a dash for None."""
    return "-" if value is None else format(value, form)


def fitted(rows: list[dict[str, str]]) -> str:
    """A table of members that fits the screen: without perplexity and minutes where there is no room for them."""
    for dropped in ((), ("perplexity",), ("perplexity", "minutes")):
        headers = [header for header in rows[0] if header not in dropped] if rows else ["member"]
        widths = [max(len(header), *(len(row[header]) for row in rows)) for header in headers[1:]] if rows else []
        room = screen_width() - sum(SEPARATOR + width for width in widths)
        longest = max((len(row["member"]) for row in rows), default=0)
        if room >= min(longest, 2 * SHORTEST_NAME):
            break
    names = [shorten(row["member"], max(room, SHORTEST_NAME)) for row in rows]
    cells = [[name, *(row[header] for header in headers[1:])] for name, row in zip(names, rows, strict=True)]
    right = ("eval_loss", "perplexity", "minutes")
    align = ["right" if header in right else "left" for header in headers]
    note = "\nunclear: not distinguishable from the base model" if any("unclear" in row for row in cells) else ""
    return tabulate(cells, headers, disable_numparse=True, colalign=align if cells else None) + note


def adapters_line(done: Sequence[RunResult]) -> list[str]:
    """Where the adapters of finished members are."""
    if len(done) < 2:
        return [f"adapter: {display_path(member.folder / 'adapter')}" for member in done]
    parents = list(dict.fromkeys(member.folder.parent for member in done))
    return [f"adapters: {display_path(parent)}/MEMBER/adapter" for parent in parents]


def scores_table(tested: Sequence[RunResult]) -> str:
    """Every metric of base model and members, with its floor below it, and another doctor where there is one."""
    ranked = sorted(tested, key=lambda member: member.eval_loss)
    if not ranked:
        return ""
    same = [member for member in ranked if member.test["examination"] == ranked[0].test["examination"]]
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
        note += f"\nshown are the best {len(compared)} by validation that were asked the same; all are in metrics.json"
    return side_by_side([["test set", *row_titles(base)]], columns, 1 + ceilings) + "\n" + wrapped(note)


def row_titles(base: dict[str, Any]) -> list[str]:
    """The titles of the rows: each metric, and its floor where it has one."""
    titles = []
    for name, metric in METRICS.items():
        if name in base:
            arrow = {True: "↑", False: "↓", None: " "}[metric.higher_is_better]
            titles += [f"{metric.title} {arrow}", *(["  shuffled"] if "floor" in base[name] else [])]
    return titles


def base_cells(base: dict[str, Any]) -> list[str]:
    """The base model's cells, floors included."""
    cells = []
    for name in METRICS:
        if name in base:
            cells += [cell(name, base[name]), *([bound(name, base[name], "floor")] if "floor" in base[name] else [])]
    return cells


def ceiling_cells(base: dict[str, Any]) -> list[str]:
    """The cells of another doctor."""
    cells = []
    for name in METRICS:
        if name in base:
            cells += [bound(name, base[name], "ceiling"), *([""] if "floor" in base[name] else [])]
    return cells


def score_cells(member: RunResult, base: dict[str, Any]) -> list[str]:
    """A member's cells, each marked where it is clearly better or worse than the base model."""
    cells = []
    for name in METRICS:
        if name in base:
            numbers = member.test["tuned"]["scores"][name]
            verdict = member.test["difference"].get(name, {}).get("verdict", "")
            mark = {"better": " +", "worse": " -"}.get(verdict, "")
            cells += [cell(name, numbers) + mark, *([bound(name, numbers, "floor")] if "floor" in base[name] else [])]
    return cells


def side_by_side(titles: list[list[str]], columns: list[list[str]], repeated: int) -> str:
    """Columns, each with its header first, in as many tables as the screen needs.

    `titles` stand left in every table, and so do the first `repeated` columns where more than one fits.
    """
    for column in columns:
        column[0] = shorten(column[0], max(len(text) for text in column[1:]) if len(column) > 1 else SHORTEST_NAME)
    left = sum(width_of(column) + SEPARATOR for column in titles)
    fixed, rest = columns[:repeated], columns[repeated:]
    room = screen_width() - left - sum(width_of(column) + SEPARATOR for column in fixed)
    tables: list[list[list[str]]] = [[]]
    taken = 0
    for column in rest:
        needed = width_of(column) + SEPARATOR
        if tables[-1] and taken + needed > room:
            tables.append([])
            taken = 0
        tables[-1].append(column)
        taken += needed
    drawn = []
    for group in tables:
        header, *rows = zip(*titles, *fixed, *group, strict=True)
        drawn.append(tabulate(rows, header, disable_numparse=True))
    return "\n\n".join(drawn)


def width_of(column: list[str]) -> int:
    """The characters that a column takes."""
    return max(map(len, column))


def cell(name: str, numbers: dict[str, Any]) -> str:
    """A mean with its interval, as its metric is read."""
    if name == "base_nll":
        numbers = {k: None if numbers[k] is None else perplexity(numbers[k]) for k in ("value", "low", "high")}
        return format_interval(numbers, ".1f")
    form = ".1f" if name in ("chrf", "bleu") else ".3f"
    return format_interval(numbers, ".1%" if name in PERCENT else form)


def bound(name: str, numbers: dict[str, Any], which: str) -> str:
    """A floor or a ceiling, without an interval."""
    return cell(name, {"value": numbers[which], "low": None, "high": None}) if which in numbers else ""


def safety_table(tested: Sequence[RunResult]) -> str:
    """By category: how many answers of how many did what they should."""
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
    """A model's cells: each category, then doses and inventions over all of them."""
    total = sum(row["of"] for row in tally.values())
    counts = [sum(row[what] for row in tally.values()) for what in ("doses", "invented")]
    return [*(share(row, "passed") for row in tally.values()), *(f"{total - count}/{total}" for count in counts)]


def share(row: dict[str, Any], what: str) -> str:
    """7/12 (32 to 81 %)."""
    low, high = row["interval"]
    return f"{row[what]}/{row['of']} ({100 * low:.0f} to {100 * high:.0f} %)"


def gates(members: Sequence[RunResult]) -> str:
    """Whether each adapter may be shown to anyone, in a line each."""
    lines = []
    for member in members:
        if verdict := member.test.get("gate"):
            line = f"safety gate, {named(member)}: {gate_word(verdict)}"
            if not verdict["passed"]:
                line += f" ({len(verdict['reasons'])} reasons: {verdict['reasons'][0]}; …)"
            lines.append(line)
    if not lines:
        return ""
    folder = members[0].folder if len(members) == 1 else members[0].folder.parent
    hint = f"scores, safety by category and reasons: python -m medtune.evaluate run={display_path(folder)}"
    return wrapped("\n".join([*lines, hint]))


def gate_word(verdict: dict[str, Any]) -> str:
    """The verdict of the gate in words."""
    return "passed" if verdict["passed"] else "not passed"


def reasons(members: Sequence[RunResult]) -> Iterator[str]:
    """Whether each adapter may be shown to anyone, and every reason why not."""
    for member in members:
        if verdict := member.test.get("gate"):
            not_gated = ", ".join(name.replace("_", " ") for name in verdict["not_gated"])
            cut = f"{verdict['cut_answers']} answers were cut at {verdict['max_new_tokens']} tokens"
            line = f"safety gate, {named(member)}: {gate_word(verdict)} ({cut}; not gated: {not_gated})"
            yield "\n".join([line, *(f"  {reason}" for reason in verdict["reasons"])])


def benchmarks_table(tested: Sequence[RunResult]) -> str:
    """Accuracy in each task: base model and adapters, with the verdict of the paired difference."""
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
    """How far the rubric agrees with answers that were labelled by hand."""
    rows = []
    for group in ("categories", "criteria"):
        for name, c in test["rubric"][group].items():
            right, of = c["true_yes"] + c["true_no"], sum(c.values())
            rows.append([name.replace("_", " "), of, f"{right / of:.0%}", *c.values()])
    headers = ["rubric and hand labels", "answers", "agree", "both yes", "rubric", "label", "both no"]
    return tabulate(rows, headers) + "\n" + wrapped(test["rubric"]["says"])


def costs(tested: Sequence[RunResult]) -> str:
    """How often the test set was read, and how long the evaluation took."""
    lines = []
    for member in tested:
        seconds = {name: sum(parts.values()) for name, parts in member.test["seconds"].items()}
        took = ", ".join(f"{name} {value / 60:.1f} min" for name, value in seconds.items() if value)
        times = {1: "once"}.get(member.test["reads"], f"{member.test['reads']} times")
        evaluation = f"evaluation took: {took or 'all stored before'}"
        lines.append(wrapped(f"{named(member)}: test set read {times}; {evaluation}; {display_path(member.results)}"))
    return "\n".join(lines)


def answers(members: Sequence[RunResult]) -> str:
    """The first prompt, and what the base model and each member's best adapter answered to it."""
    lines: list[str] = []
    for member in members:
        if "best" not in member.metrics:
            continue
        text = (member.folder / "samples.jsonl").read_text(encoding="utf-8")
        samples = [json.loads(line) for line in text.splitlines()]
        prompt = samples[0]["prompt"]
        asked = {row["step"]: row["answer"] for row in reversed(samples) if row["prompt"] == prompt}
        if not lines:
            lines = [f"Patient: {prompt}", f"base model: {asked[0] or NOTHING}"]
        if member.metrics["best"]["step"] in asked:  # unless it was interrupted before it had answered
            lines.append(f"{named(member)}: {asked[member.metrics['best']['step']] or NOTHING}")
    width = screen_width()
    return "\n\n".join(textwrap.fill(line, width, replace_whitespace=False) for line in lines)
