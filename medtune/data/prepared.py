"""conf/data -> train, validation and test sets of conversations, with every row that was left out accounted for.

source -> layout -> normalize -> clean -> redflag (together: screen) -> duplicates -> split (together: select) -> store.
`python -m medtune.prepare` shows what comes out.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtune.config.schema import Data
from medtune.config.serialize import to_plain
from medtune.data.store import SPLITS, Conversation, ConversationTable
from medtune.runtime.cache import cached_folder

__all__ = ["Conversation", "PreparedData", "prepare"]


@dataclass
class PreparedData:
    """A prepared set: three splits, the report of how they came about, and the file of rejects."""

    train: ConversationTable
    validation: ConversationTable
    test: ConversationTable
    report: dict[str, Any]
    rejects: Path

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is in the splits."""
        return self.report["fingerprint"]


def prepare(data: Data) -> PreparedData:
    """Reads, cleans, audits and splits the conversations that `data` names; the second time they come from the cache.

    Raises `UserError` when a source cannot be read or understood, when no row is usable, when the training or
    validation split would be empty (unless `data.test_size` is 1), or when held-out questions leak into training.
    """
    from medtune.data.pipeline import build_splits, sources_of
    from medtune.data.reading.sources import location

    folder = cached_folder(f"data-{cache_key(data)[:16]}", lambda folder: build_splits(data, folder))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for described, source in zip(report["sources"], sources_of(data).values(), strict=True):
        described["from"] = location(source)  # a set is known by its content: the file may have another name today
    train, validation, test = (ConversationTable(folder / f"{name}.arrow") for name in SPLITS)
    return PreparedData(train, validation, test, report, folder / "rejects.jsonl")


def cache_key(data: Data) -> str:
    """Returns a name for what `prepare` would make of `data`: of the content of its sources, its rules and this
    package's.
    """
    from medtune.data.cleaning.decontamination import ngram_fingerprints
    from medtune.data.pipeline import sources_of
    from medtune.data.reading.sources import identity

    rules = to_plain(data)
    sources = [{**to_plain(source), "path": identity(source, place)} for place, source in sources_of(data).items()]
    modules = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".yaml"))
    code = [hashlib.sha256(module.read_bytes()).hexdigest() for module in modules]
    described = [{**rules, "members": None, "path": None}, sources, ngram_fingerprints(data.benchmarks), code]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
