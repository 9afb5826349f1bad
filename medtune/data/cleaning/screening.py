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
from medtune.data.cleaning.language import is_english
from medtune.data.cleaning.pii import contacts
from medtune.data.cleaning.red_flags import red_flag, urges_care
from medtune.data.cleaning.rules import Cleaner
from medtune.data.hashing import hash_words, minhash_bands, ngrams, pairs_of
from medtune.data.reading.cells import is_empty
from medtune.data.reading.formats import SPLIT_NAMES, RowFormat
from medtune.data.reading.normalize import answer_of, normalize, normalized_words, question_of
from medtune.data.reading.rejects import RejectRow
from medtune.data.reading.sources import Row
from medtune.data.reading.turns import Messages
from medtune.data.store import SPLITS, Reject, batch_of

SENTENCE = re.compile(
    r"[?]|\b(i|i'?m|i'?ve|im|ive|my|me|we|he|she|it|they|you|is|are|am|was|were|be|been|do|does|did|has|have|had|can|could"
    r"|should|would|will|may|might|what|which|who|why|when|where|how|please|need|want|feel|feels|hurts?)\b",
    re.IGNORECASE,
)
LONGEST_TITLE = 12  # words
UNMARKED = -1  # the split of a row that names none


@dataclass
class ProcessedRows:
    """What came of some rows. The batch and the arrays' first axis run over the conversations kept.

    `batch` has the columns of `store.SCHEMA`; `question` and `answer` are 64-bit hashes of the words; `bands` is
    [conversations, BANDS]; `marked` is the split that a row names itself, or `UNMARKED`. `counts` has the rows that
    each text rule changed, the red flags seen and answered, what was not used, and the rows that are not in English.
    """

    batch: pa.RecordBatch
    question: np.ndarray
    answer: np.ndarray
    bands: np.ndarray
    marked: np.ndarray
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
        rejects, counts, unused = [], Counter[str](), Counter[str]()
        marked: list[int] = []
        questions: list[list[str]] = []
        answers: list[list[str]] = []
        for number, row in rows:
            try:
                raw = normalize(row, self.layout, self.data.system_prompt, unused)
                split = self.split_of(row)
                messages, changes = self.clean(raw)
                counts.update(f"changed/{rule}" for rule in changes)
                asked, answered = question_of(messages), answer_of(messages)
                question, answer = normalized_words(asked), normalized_words(answered)
                self.refuse_row(row, raw, messages, question, answer)
                self.audit(messages, counts)
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
            marked.append(split)
            counts["untrained"] += sum("weight" in message for message in messages)
            counts["other language"] += not is_english(question + answer)
        counts.update({f"unused/{what}": count for what, count in unused.items()})
        return ProcessedRows(
            batch_of(kept),
            np.array([hash_words(words) for words in questions], np.uint64),
            np.array([hash_words(words) for words in answers], np.uint64),
            minhash_bands([pairs_of(words) for words in questions]),
            np.array(marked, np.int8),
            rejects,
            counts,
        )

    def refuse_row(
        self, row: dict[str, Any], raw: Messages, messages: Messages, question: list[str], answer: list[str]
    ) -> None:
        """Applies the row rules. Raises `RejectRow` with the rule's name and the reason."""
        rules = self.data.rules
        if any(not m["content"] for m in messages):
            raise RejectRow("with nothing left of a message after cleaning", "empty")
        if rules.titles and is_title(raw, question, answer, self.cell(row, "title")):
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

    def audit(self, messages: Messages, counts: Counter[str]) -> None:
        """Looks for an emergency that no answer after it treats as one. Raises `RejectRow` where such rows go."""
        found = emergencies(messages)
        missed = [
            category for category, place in found.items() if not urges_care(answer_of(messages[place:]), category)
        ]
        if not found:
            return
        category = missed[0] if missed else next(iter(found))
        counts[f"redflag/{category}"] += 1
        if not missed:
            counts[f"urged/{category}"] += 1
        elif self.data.redflag is RedFlag.drop:
            raise RejectRow(f"whose answer does not send an emergency ({category}) to urgent care", "redflag")

    def split_of(self, row: dict[str, Any]) -> int:
        """Returns the split that a row names, or `UNMARKED`. Raises `RejectRow` for a name that is none's."""
        value = row.get(self.layout.columns["split"]) if "split" in self.layout.columns else None
        if is_empty(value):
            return UNMARKED
        named = SPLIT_NAMES.get(str(value).strip().lower())
        if named is None:
            raise RejectRow(f"of the unknown split {str(value)[:12]!r} (known: {', '.join(SPLITS)})")
        return SPLITS.index(named)

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


def emergencies(messages: Messages) -> dict[str, int]:
    """Returns each emergency that the patient describes, and the place of the message that does so first.

    An answer before it sends nobody to urgent care. Where no message alone describes one, all up to some message may.
    """
    found: dict[str, int] = {}
    asked = [(place, m["content"]) for place, m in enumerate(messages) if m["role"] == "user"]
    for place, text in asked:
        if category := red_flag(text):
            found.setdefault(category, place)
    texts = [text for _, text in asked]
    if found or len(asked) == 1 or not red_flag("\n".join(texts)):
        return found
    for number, (place, _) in enumerate(asked[1:], 2):
        if category := red_flag("\n".join(texts[:number])):
            return {category: place}
    return found


def without_contacts(content: Any) -> Any:
    """Returns what stands in a rejected row, without e-mail addresses and numbers that tell who somebody is."""
    if isinstance(content, str):
        return contacts(content, "user")[0]
    if isinstance(content, dict):
        return {name: without_contacts(value) for name, value in content.items()}
    return [without_contacts(value) for value in content] if isinstance(content, list) else content


def is_title(raw: Messages, question: list[str], answer: list[str], title: Any) -> bool:
    """Returns whether all that a patient says is a headline: the row's own, or a few English words without a verb or
    question mark. A headline in another language cannot be told from a question.
    """
    asked = question_of(raw)
    if isinstance(title, str) and normalized_words(title.removeprefix("Q.")) == question:
        return "?" not in title
    if len(question) > LONGEST_TITLE or not is_english(question + answer):
        return False
    return not SENTENCE.search(asked) and not re.search(r"[.!,;]\s|\d", asked)
