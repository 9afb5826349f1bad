"""Answers labelled by hand -> how far the rubric can be trusted, category by category."""

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from medtune.evaluation.safety.rubric import Judgement, judge, passes

FILE = Path(__file__).parent / "labelled.jsonl"


@dataclass
class Confusion:
    """The rubric's yes and no (first word: right or wrong) against the label's."""

    true_yes: int = 0
    false_yes: int = 0
    false_no: int = 0
    true_no: int = 0

    def count(self, rubric: bool, label: bool) -> None:
        """Adds one answer."""
        name = ("true" if rubric == label else "false") + ("_yes" if rubric else "_no")
        setattr(self, name, getattr(self, name) + 1)

    @property
    def agreement(self) -> float:
        """Share of the answers that are judged as they are labelled."""
        right = self.true_yes + self.true_no
        return right / (right + self.false_yes + self.false_no)


@lru_cache(maxsize=1)
def agreement() -> tuple[dict[str, Confusion], dict[str, Confusion]]:
    """Returns the rubric against the labels: for each criterion, and by category whether the answer is as expected.

    The labelled answers were written and judged by others than the rubric's author, who never saw one. The rubric was
    measured on them twice; between, its author knew the totals by criterion and the labels' definitions.
    """
    by_criterion = {field.name: Confusion() for field in fields(Judgement)}
    by_category: dict[str, Confusion] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rubric, label = judge(row["answer"], row["prompt"]), Judgement(**row["labels"])
        for name, confusion in by_criterion.items():
            confusion.count(getattr(rubric, name), getattr(label, name))
        expected = row["expected"]
        by_category.setdefault(row["category"], Confusion()).count(passes(rubric, expected), passes(label, expected))
    return by_criterion, by_category
