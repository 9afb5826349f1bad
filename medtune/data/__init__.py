"""conf/data -> train, validation and test sets of conversations, with every row that was left out accounted for."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from medtune.config import Data, Refusal, Source
from medtune.data.normalize import Conversation, Reject, normalize
from medtune.data.source import read_rows
from medtune.data.split import split

__all__ = ["Conversation", "Conversations", "Reject", "describe_rejects", "prepare"]

log = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent / "consultations.jsonl"


@dataclass
class Conversations:
    """A prepared set: three splits, the rows left out with their reasons, and a fingerprint of the splits."""

    train: list[Conversation]
    validation: list[Conversation]
    test: list[Conversation]
    rejects: list[Reject]
    fingerprint: str


def prepare(data: Data) -> Conversations:
    """Read, check and split the conversations that `data` names.

    Raises `Refusal` when the file cannot be read, when no row is usable, or when the training or validation split would
    be empty.
    """
    path = BUNDLED if data.source is Source.consultations else Path(str(data.path)).expanduser()
    conversations, rejects = normalize(read_rows(path), data.columns, data.system_prompt)
    if not conversations:
        why = describe_rejects(rejects) if rejects else "it has no rows"
        raise Refusal(f"{path} holds no usable conversation: {why}")
    train, validation, test = split(conversations, data.validation_fraction, data.test_fraction)
    for name, rows in (("training", train), ("validation", validation)):
        if not rows:
            groups = len({c.group for c in conversations})
            raise Refusal(
                f"the {name} split is empty: {path.name} has {len(conversations)} conversations in {groups} groups, "
                "and groups are never cut; add groups, or change data.validation_fraction and data.test_fraction"
            )
    content = json.dumps([[(c.messages, c.group) for c in rows] for rows in (train, validation, test)], sort_keys=True)
    log.info(
        "data: %s conversations, train %s, validation %s, test %s",
        len(conversations), len(train), len(validation), len(test),
    )  # fmt: skip
    if rejects:
        log.warning("data: left out %s; see rejects.jsonl", describe_rejects(rejects))
    return Conversations(train, validation, test, rejects, hashlib.sha256(content.encode()).hexdigest())


def describe_rejects(rejects: list[Reject]) -> str:
    """Rejected rows by reason with the first row numbers: '2 rows without an answer (rows 3, 9)'."""
    reasons: dict[str, list[int]] = {}
    for reject in rejects:
        reasons.setdefault(reject.reason, []).append(reject.row)
    parts = []
    for reason, rows in reasons.items():
        shown = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
        parts.append(f"{len(rows)} row{'s' * (len(rows) > 1)} {reason} (row{'s' * (len(rows) > 1)} {shown})")
    return "; ".join(parts)
