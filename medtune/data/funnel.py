"""What became of every row -> counts for the report, and lines to read."""

import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medtune.config.enums import RedFlag
from medtune.config.schema import Data
from medtune.data.cleaning.rules import VERSION
from medtune.data.cleaning.screening import ProcessedRows
from medtune.data.splitting.selection import RowKeys, Selection
from medtune.data.splitting.split import split_sizes
from medtune.data.store import SPLITS, Reject
from medtune.runtime.errors import UserError

log = logging.getLogger(__name__)

# What each rule of the funnel left out, worded to follow a number of rows.
RULES = {
    "unusable": "cannot be read as a conversation",
    "forbidden": "that say themselves not to train on them",
    "empty": "with nothing left of a message after cleaning",
    "titles": "whose question is only a title",
    "short": "too short",
    "long": "too long",
    "benchmarks": "that overlap with a benchmark",
    "redflag": "whose answer does not send an emergency to urgent care",
    "duplicates": "that repeat an earlier one",
    "near_duplicates": "that nearly repeat an earlier one",
    "answers_per_question": "that answer a question once more",
    "questions_per_answer": "with a stock answer",
    "leaks": "whose question is in another split",
    "split_size": "whose group is in a split that is full",
    "max_conversations": "beyond the source's limit",
    "weight": "beyond the source's weight",
    "max_length": "whose answer does not fit in trainer.max_length",
}


@dataclass
class RowStats:
    """What stays in memory of the screened rows. The lists and arrays run over them."""

    described: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    rows: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the configured source
    sources: list[str] = field(default_factory=list)  # with what the row says about it
    groups: list[str] = field(default_factory=list)
    question: list[np.ndarray] = field(default_factory=list)
    answer: list[np.ndarray] = field(default_factory=list)
    bands: list[np.ndarray] = field(default_factory=list)
    marked: list[np.ndarray] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)  # row of each reason

    def add(self, part: ProcessedRows, name: str) -> None:
        self.rows += part.batch["row"].to_pylist()
        self.names += [sys.intern(name)] * part.batch.num_rows
        self.sources += map(sys.intern, part.batch["source"].to_pylist())
        self.groups += map(sys.intern, part.batch["group"].to_pylist())
        for column in ("question", "answer", "bands", "marked"):
            getattr(self, column).append(getattr(part, column))
        self.counts += part.counts
        for reject in part.rejects:
            self.count(reject)

    def count(self, reject: Reject) -> None:
        self.rules[reject.rule] += 1
        if reject.rule in ("unusable", "forbidden"):
            self.reasons[reject.reason] += 1
            self.first.setdefault(reject.reason, reject.row)

    def why_unusable(self) -> dict[str, int]:
        """Returns how many rows are left out for what they are, by the reason and its first row; most frequent
        first.
        """
        return {f"{reason} (first: row {self.first[reason]})": n for reason, n in self.reasons.most_common()}

    def counted(self, kind: str) -> dict[str, int]:
        """Returns the counts of a kind by what they are of, the largest first."""
        found = ((*name.partition("/"), count) for name, count in self.counts.most_common())
        return {what: count for name, _, what, count in found if name == kind}

    def keys(self) -> RowKeys:
        arrays = (np.concatenate(column) for column in (self.question, self.answer, self.bands, self.marked))
        return RowKeys(self.names, self.groups, *arrays)


def describe(data: Data, seen: RowStats, selection: Selection, kept: np.ndarray) -> dict[str, Any]:
    """Returns the report of a set: sources, funnel, rows that text rules changed, red flags, split sizes in
    conversations.
    """
    by_split = Counter(SPLITS[selection.splits[row]] for row in kept)
    by_source: dict[str, dict[str, int]] = {}
    for row in kept:
        by_source.setdefault(seen.sources[row], dict.fromkeys(SPLITS, 0))[SPLITS[selection.splits[row]]] += 1
    flags, urged = seen.counted("redflag"), seen.counted("urged")
    return {
        "cleaning_version": VERSION,
        "sources": seen.described,
        "funnel": {"read": seen.read, **dict(seen.rules.most_common()), "kept": len(kept)},
        "unusable": seen.why_unusable(),
        "unused": seen.counted("unused"),
        "untrained": seen.counts["untrained"],
        "other_language": seen.counts["other language"],
        "marked": sorted({SPLITS[split] for part in seen.marked for split in part[part >= 0].tolist()}),
        "changed": seen.counted("changed"),
        "redflag": {
            "policy": data.redflag.name,
            "emergencies": sum(flags.values()),
            "urged": sum(urged.values()),
            "by_category": {n: {"emergencies": c, "urged": urged.get(n, 0)} for n, c in sorted(flags.items())},
        },
        "splits": {name: by_split[name] for name in SPLITS},
        "asked": {SPLITS[split]: size for split, size in split_sizes(data.validation_size, data.test_size).items()},
        "by_source": by_source,
        "groups": len({selection.groups[row] for row in kept}),
    }


def describe_rules(seen: RowStats) -> str:
    """Returns why rows were left out, most frequent first."""
    reasons = [f"{count} {reason}" for reason, count in seen.why_unusable().items()]
    rules = [f"{n} by {rule}" for rule, n in seen.rules.most_common() if rule not in ("unusable", "forbidden")]
    return "; ".join(reasons + rules)


def require_splits(counted: dict[str, Any], seen: RowStats) -> None:
    """Raises `UserError` when a split that is needed is empty."""
    sizes, groups = counted["splits"], counted["groups"]
    needed = ("test",) if counted["asked"]["test"] == 1 else ("train", "validation")
    for name in needed:
        if not sizes[name]:
            raise UserError(
                f"the {name} split is empty: {sum(sizes.values())} conversations in {groups} groups, and groups are "
                "never cut: name another data.columns.group, or change data.validation_size and data.test_size"
                + (f" (left out: {describe_rules(seen)})" if seen.rules else "")
            )


def log_report(report: dict[str, Any]) -> None:
    """Logs how a set came about: its sources, the funnel, the red flags, the splits."""
    for source in report["sources"]:
        log.info(
            "data: %s rows of %s (%s), read as %s", source["rows"], source["name"], source["from"], source["layout"]
        )
    for rule, count in left_out(report).items():
        log.info("data: left out %s %s", count, RULES[rule])
    if report["unusable"]:
        log.warning(
            "data: %s; see rejects.jsonl", "; ".join(f"{n} {reason}" for reason, n in report["unusable"].items())
        )
    for line in notes(report):
        log.info("data: %s", line)
    flags = report["redflag"]
    if flags["emergencies"]:
        log.info(
            "data: %s patients describe an emergency, %s answers send them to urgent care (redflag=%s)",
            flags["emergencies"], flags["urged"], flags["policy"],
        )  # fmt: skip
    missed = flags["emergencies"] - flags["urged"]
    if missed and flags["policy"] == RedFlag.report.name:
        log.warning("data: %s emergencies are trained on with an answer that misses them: data.redflag=drop", missed)
    sizes = ", ".join(f"{name} {size}" for name, size in report["splits"].items())
    log.info("data: %s conversations, %s", report["funnel"]["kept"], sizes)
    if report["train_rows"] != report["splits"]["train"]:
        log.info("data: by their weights the training conversations are shown %s times an epoch", report["train_rows"])
    for line in smaller(report):
        log.warning("data: %s", line)


def notes(report: dict[str, Any]) -> list[str]:
    """Returns a line for each thing that the rows hold and that was not used, or used otherwise than one might
    think.
    """
    lines = []
    if report["unused"]:
        lines.append("not used: " + ", ".join(f"{what} ({count:,})" for what, count in report["unused"].items()))
    if report["untrained"]:
        lines.append(f"{report['untrained']:,} answers are read and not trained on, as their rows say")
    if report["other_language"]:
        lines.append(
            f"{report['other_language']:,} conversations are not in English: the rules titles and recase and the "
            "red-flag audit know no other language"
        )
    if held_out := [name for name in report["marked"] if name != "train"]:
        lines.append(f"the rows say themselves which are for {' and '.join(held_out)}")
    return lines


def smaller(report: dict[str, Any]) -> list[str]:
    """Returns a line for each split of a fixed size that could not be filled."""
    return [
        f"the {name} split has {report['splits'][name]} conversations, not {size:g}: it is filled from a quarter of "
        "the groups, and there are no more in it"
        for name, size in report["asked"].items()
        if report["splits"][name] < size and size > 1 and name not in report["marked"]
    ]


def left_out(report: dict[str, Any]) -> dict[str, int]:
    """Returns rows left out by rule, in the order of the rules."""
    return {rule: report["funnel"][rule] for rule in RULES if report["funnel"].get(rule)}
