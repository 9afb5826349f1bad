"""Rows -> cleaned conversations and rejects, with what later steps compare rows by. This part runs in parallel.

A row is looked at on its own here; what depends on other rows is in duplicates.py and split.py.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from medtune.config.enums import RedFlag
from medtune.config.schema import Data, Source
from medtune.data.cleaning.pii import contacts
from medtune.data.cleaning.red_flags import red_flag, urges_care
from medtune.data.cleaning.rules import Cleaner
from medtune.data.hashing import hash_words, minhash_bands, ngrams, pairs_of
from medtune.data.reading.formats import RowFormat
from medtune.data.reading.normalize import Messages, RejectRow, answer_of, normalize, normalized_words, question_of
from medtune.data.reading.sources import Row
from medtune.data.store import Reject, batch_of

SENTENCE = re.compile(
    r"[?]|\b(i|i'?m|i'?ve|im|ive|my|me|we|he|she|it|they|you|is|are|am|was|were|be|been|do|does|did|has|have|had|can|could"
    r"|should|would|will|may|might|what|which|who|why|when|where|how|please|need|want|feel|feels|hurts?)\b",
    re.IGNORECASE,
)
LONGEST_TITLE = 12  # words


@dataclass
class ProcessedRows:
    """What came of some rows. The batch and the arrays' first axis run over the conversations kept.

    `batch` has the columns of `store.SCHEMA`; `question` and `answer` are 64-bit hashes of the words; `bands` is
    [conversations, BANDS]. `counts` has the rows that each text rule changed, and the red flags seen and answered.
    """

    batch: pa.RecordBatch
    question: np.ndarray
    answer: np.ndarray
    bands: np.ndarray
    rejects: list[Reject]
    counts: Counter[str]


class RowProcessor:
    """Normalises, cleans and audits the rows of one source."""

    def __init__(self, data: Data, source: Source, layout: RowFormat, benchmarks: frozenset[int]) -> None:
        self.data, self.source, self.layout, self.benchmarks = data, source, layout, benchmarks
        self.clean = Cleaner(asdict(data.rules), source.product_names)
        self.group_pattern = re.compile(source.group_pattern) if source.group_pattern else None

    def __call__(self, rows: Sequence[Row]) -> ProcessedRows:
        """Screens some rows; their order stays."""
        kept: list[tuple[int, str, str, str]] = []
        rejects, counts = [], Counter[str]()
        questions: list[list[str]] = []
        answers: list[list[str]] = []
        for number, row in rows:
            try:
                raw = normalize(row, self.layout, self.data.system_prompt)
                messages, changes = self.clean(raw)
                counts.update(f"changed/{rule}" for rule in changes)
                asked, answered = question_of(messages), answer_of(messages)
                question, answer = normalized_words(asked), normalized_words(answered)
                self.refuse_row(row, raw, messages, question, answer)
                self.audit(messages, answered, counts)
            except RejectRow as unusable:
                content = str(row) if isinstance(row, Exception) else row
                if self.data.rules.contacts:
                    content = without_contacts(content)
                rejects.append(Reject(number, self.source.name, unusable.rule, str(unusable), content))
                continue
            written = json.dumps(messages, ensure_ascii=False)
            kept.append((number, self.source_of(row), self.group_of(row, asked), written))
            questions.append(question)
            answers.append(answer)
        return ProcessedRows(
            batch_of(kept),
            np.array([hash_words(words) for words in questions], np.uint64),
            np.array([hash_words(words) for words in answers], np.uint64),
            minhash_bands([pairs_of(words) for words in questions]),
            rejects,
            counts,
        )

    def refuse_row(
        self, row: dict[str, Any], raw: Messages, messages: Messages, question: list[str], answer: list[str]
    ) -> None:
        """Applies the row rules. Raises `Unusable` with the rule's name and the reason."""
        rules = self.data.rules
        if any(not m["content"] for m in messages):
            raise RejectRow("with nothing left of a message after cleaning", "empty")
        if rules.titles and is_title(raw, question, self.cell(row, "title")):
            raise RejectRow("whose question is only a title", "titles")
        if len(question) < rules.min_question_words:
            raise RejectRow(f"whose question has fewer than {rules.min_question_words} words", "short")
        if len(answer) < rules.min_answer_words:
            raise RejectRow(f"whose answer has fewer than {rules.min_answer_words} words", "short")
        words = sum(len(normalized_words(m["content"])) for m in messages[3:]) + len(question) + len(answer)
        if rules.max_words is not None and words > rules.max_words:
            raise RejectRow(f"of more than {rules.max_words} words", "long")
        if self.benchmarks and not self.benchmarks.isdisjoint(
            gram for m in messages[1:] for gram in ngrams(normalized_words(m["content"]), self.data.benchmark_words)
        ):
            raise RejectRow("that overlap with a benchmark", "benchmarks")

    def audit(self, messages: Messages, answered: str, counts: Counter[str]) -> None:
        """Looks for an emergency that the answer does not treat as one. Raises `Unusable` where such rows go."""
        category = red_flag("\n".join(m["content"] for m in messages if m["role"] == "user"))
        if category is None:
            return
        counts[f"redflag/{category}"] += 1
        if urges_care(answered, category):
            counts[f"urged/{category}"] += 1
        elif self.data.redflag is RedFlag.drop:
            raise RejectRow(f"whose answer does not send an emergency ({category}) to urgent care", "redflag")

    def source_of(self, row: dict[str, Any]) -> str:
        """Returns the source's name, with what the row itself says about where it comes from."""
        own = self.cell(row, "source")
        return f"{self.source.name}/{own}" if own else self.source.name

    def group_of(self, row: dict[str, Any], question: str) -> str:
        """Returns the group that a row names, by its column or in its question; empty if it names none."""
        named = self.cell(row, "group")
        if named is None and self.group_pattern and (found := self.group_pattern.search(question)):
            named = " ".join(normalized_words(found[1] or ""))
        return "" if named is None or named == "" else f"{self.source.name} {named}"

    def cell(self, row: dict[str, Any], part: str) -> Any:
        """Returns what a row says about its title, group or source; None where it says nothing (pandas writes NaN)."""
        value = row.get(self.layout.columns[part]) if part in self.layout.columns else None
        return None if isinstance(value, float) and math.isnan(value) else value


def without_contacts(content: Any) -> Any:
    """Returns what stands in a rejected row, without e-mail addresses and numbers that tell who somebody is."""
    if isinstance(content, str):
        return contacts(content, "user")[0]
    if isinstance(content, dict):
        return {name: without_contacts(value) for name, value in content.items()}
    return [without_contacts(value) for value in content] if isinstance(content, list) else content


def is_title(raw: Messages, question: list[str], title: Any) -> bool:
    """Returns whether all that a patient says is a headline: the row's own, or a few words without a verb or question
    mark.
    """
    asked = question_of(raw)
    if isinstance(title, str) and normalized_words(title.removeprefix("Q.")) == question:
        return "?" not in title
    return len(question) <= LONGEST_TITLE and not SENTENCE.search(asked) and not re.search(r"[.!,;]\s|\d", asked)
