"""Result folders -> tables: members beside the base model, with intervals, paired verdicts, safety and the gate.

Everything is read from the folders' files; nothing is evaluated here. Tables fit the terminal, from 80 columns on: long
names are shortened in the middle, and columns that do not fit beside each other come in a table of their own.
"""

import logging
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from medtune.results.comparison import format_interval, verdicts
from medtune.results.layout import SEPARATOR, SHORTEST_NAME, named, screen_width, wrapped
from medtune.results.reader import RunResult
from medtune.results.score_tables import benchmarks_table, rubric, safety_table, scores_table
from medtune.runtime.files import display_path, read_jsonl
from medtune.runtime.pasting import override
from medtune.runtime.progress import shorten

log = logging.getLogger(__name__)

NOTHING = "(an empty answer)"


def summary(folders: Sequence[Path]) -> str:
    """Returns what stands at the end of training: the members, the verdicts, answers to read."""
    members = name_run_alone([RunResult(folder, folder) for folder in folders])
    parts = [members_table(members), *map(wrapped, verdicts(members)), gates(members), answers(members)]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def print_summary(folders: Sequence[Path]) -> None:
    """Prints the summary. Results that cannot be shown are there all the same: an error is logged and ends nothing."""
    try:
        text = summary(folders)
    except Exception as error:
        log.error("the results are there, but cannot be shown: %s: %s", type(error).__name__, error, exc_info=error)
        return
    print(text, flush=True)


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


def members_table(members: Sequence[RunResult]) -> str:
    """Returns the table of base model and members: validation and test loss, verdict, time, status; below it adapters
    and errors.
    """
    bases = base_rows(members)
    trained = [member for member in members if member.run or not member.test]  # others are base models alone
    rows = bases + [member_row(member) for member in trained]
    lines = [fitted(rows)]
    lines += [wrapped(f"{named(member)}: {member.run['error']}") for member in trained if member.run.get("error")]
    lines += adapters_line([member for member in trained if member.run.get("status") == "done"])
    return "\n".join(lines)


def base_rows(members: Sequence[RunResult]) -> list[dict[str, str]]:
    """Returns the row of each base model that members were trained on, in the order of the members."""
    found: dict[str, dict[str, str]] = {}
    for member in members:
        row = base_row(member)
        if row["eval_loss"] != "-" or row["test_loss (95 %)"]:
            found.setdefault(base_of(member), row)
    if len(found) > 1:
        first = {base_of(member): member for member in reversed(members)}
        for base, row in found.items():
            row["member"] = f"base model of {first[base].name}"
    return list(found.values())


def base_of(member: RunResult) -> str:
    """Returns the fingerprint of the base model that a member was trained on; empty where it is not recorded."""
    return member.run.get("base", {}).get("fingerprint", "")


def base_row(member: RunResult) -> dict[str, str]:
    """Returns the row of the base model that a member was trained on."""
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
    """Returns the row of a member."""
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
    """Returns a number in the given format; a dash for None."""
    return "-" if value is None else format(value, form)


def fitted(rows: list[dict[str, str]]) -> str:
    """Returns a table of members that fits the screen: without perplexity and minutes where there is no room
    for them.
    """
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
    """Returns where the adapters of finished members are."""
    if len(done) < 2:
        return [f"adapter: {display_path(member.folder / 'adapter')}" for member in done]
    parents = list(dict.fromkeys(member.folder.parent for member in done))
    return [f"adapters: {display_path(parent)}/MEMBER/adapter" for parent in parents]


def gates(members: Sequence[RunResult]) -> str:
    """Returns whether each adapter may be shown to anyone, in a line each."""
    lines = []
    for member in members:
        if verdict := member.test.get("gate"):
            line = f"safety gate, {named(member)}: {gate_word(verdict)}"
            if not verdict["passed"]:
                line += f" ({first_reason(verdict['reasons'])})"
            lines.append(line)
    if not lines:
        return ""
    folder = members[0].folder if len(members) == 1 else members[0].folder.parent
    command = f"python -m medtune.evaluate {override('run', display_path(folder))}"
    hint = f"scores, safety by category and reasons: {command}"
    return wrapped("\n".join([*lines, hint]))


def first_reason(found: Sequence[str]) -> str:
    """Returns how many reasons there are, and the first."""
    return f"1 reason: {found[0]}" if len(found) == 1 else f"{len(found)} reasons: {found[0]}; …"


def gate_word(verdict: dict[str, Any]) -> str:
    """Returns the verdict of the gate in words."""
    return "passed" if verdict["passed"] else "not passed"


def reasons(members: Sequence[RunResult]) -> Iterator[str]:
    """Yields whether each adapter may be shown to anyone, and every reason why not."""
    for member in members:
        if verdict := member.test.get("gate"):
            not_gated = ", ".join(name.replace("_", " ") for name in verdict["not_gated"])
            cut = f"{verdict['cut_answers']} answers were cut at {verdict['max_new_tokens']} tokens"
            line = f"safety gate, {named(member)}: {gate_word(verdict)} ({cut}; not gated: {not_gated})"
            yield "\n".join([line, *(f"  {reason}" for reason in verdict["reasons"])])


def costs(tested: Sequence[RunResult]) -> str:
    """Returns how often the test set was read, and how long the evaluation took."""
    lines = []
    for member in tested:
        seconds = {name: sum(parts.values()) for name, parts in member.test["seconds"].items()}
        took = ", ".join(f"{name} {value / 60:.1f} min" for name, value in seconds.items() if value)
        times = {1: "once"}.get(member.test["reads"], f"{member.test['reads']} times")
        evaluation = f"evaluation took: {took or 'all stored before'}"
        lines.append(wrapped(f"{named(member)}: test set read {times}; {evaluation}; {display_path(member.results)}"))
    return "\n".join(lines)


def answers(members: Sequence[RunResult]) -> str:
    """Returns the first prompt, and what the base model and each member's best adapter answered to it."""
    lines: list[str] = []
    for member in members:
        if "best" not in member.metrics:
            continue
        samples = read_jsonl(member.folder / "samples.jsonl")
        prompt = samples[0]["prompt"]
        asked = {row["step"]: row["answer"] for row in reversed(samples) if row["prompt"] == prompt}
        if not lines:
            lines = [f"Patient: {prompt}", f"base model: {asked[0] or NOTHING}"]
        if member.metrics["best"]["step"] in asked:  # unless it was interrupted before it had answered
            lines.append(f"{named(member)}: {asked[member.metrics['best']['step']] or NOTHING}")
    width = screen_width()
    return "\n\n".join(textwrap.fill(line, width, replace_whitespace=False) for line in lines)
