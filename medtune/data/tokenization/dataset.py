"""Conversations -> token ids and labels on disk, made once for each data set, tokenizer and length."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from medtune.data.prepared import PreparedData
from medtune.data.store import SPLITS, ConversationTable, Reject, Writer, batch_of, table, write_rejects
from medtune.data.tokenization import chat_template as conversation
from medtune.runtime.cache import cached_folder
from medtune.runtime.errors import UserError
from medtune.runtime.progress import show_bars

log = logging.getLogger(__name__)

IGNORE_INDEX = -100  # torch.nn.CrossEntropyLoss's ignore_index: not taught
SCHEMA = pa.schema(
    {
        "place": pa.int64(),
        "dropped": pa.int32(),
        "length": pa.int32(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
    }
)
MANY = 5000  # conversations from which the tokenizer's threads are worth their risk


@dataclass
class TokenizedSplits:
    """Token ids of the splits, and the conversations that are too long.

    Each set has the columns input_ids and labels that SFTTrainer takes as they are, `place` (which conversation of the
    split it is), `dropped` (how many of its earliest messages were left out to fit) and `length` (in tokens, before).
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    too_long: list[Reject]
    too_long_lengths: list[int]

    @property
    def longest(self) -> int:
        """Of the training conversations, in tokens."""
        return int(pc.max(pc.list_value_length(self.train.data.column("input_ids"))).as_py())

    def record(self, rejects: Path) -> None:
        """Appends what is too long to a rejects.jsonl, and says so."""
        if self.too_long:
            with rejects.open("a", encoding="ascii") as file:
                write_rejects(file, self.too_long)
            log.warning("data: %s %s; see rejects.jsonl", len(self.too_long), self.too_long[0].reason)


def tokenize(tokenizer: PreTrainedTokenizerBase, conversations: PreparedData, max_length: int) -> TokenizedSplits:
    """Encodes every split in at most `max_length` tokens; the second time from the cache.

    Raises `UserError` if nothing of the training or validation split fits. Where all of the data is the test set, that
    must fit.
    """
    name = cache_key(tokenizer, conversations.fingerprint, max_length)

    def make(folder: Path) -> None:
        too_long: list[tuple[Reject, int]] = []
        for split in SPLITS:
            rows: ConversationTable = getattr(conversations, split)
            too_long += write(tokenizer, rows, max_length, folder / f"{split}.arrow")
        (folder / "too_long.json").write_text(
            json.dumps([[asdict(reject), length] for reject, length in too_long]), encoding="ascii"
        )

    folder = cached_folder(f"tokens-{name[:16]}", make)
    train, validation, test = (Dataset(table(folder / f"{split}.arrow")) for split in SPLITS)
    needed = {"training": train, "validation": validation} if len(conversations.train) else {"test": test}
    for kind, rows in needed.items():
        if not len(rows):
            raise UserError(
                f"no {kind} conversation fits in trainer.max_length={max_length} tokens: raise it, or shorten "
                "data.system_prompt"
            )
    too_long = json.loads((folder / "too_long.json").read_text(encoding="ascii"))
    return TokenizedSplits(
        train, validation, test, [Reject(**row) for row, _ in too_long], [length for _, length in too_long]
    )


def write(
    tokenizer: PreTrainedTokenizerBase, rows: ConversationTable, max_length: int, path: Path
) -> list[tuple[Reject, int]]:
    """Writes the token ids of one split. Returns the conversations that do not fit, with their lengths in tokens."""
    too_long = []
    reason = f"whose answer does not fit in trainer.max_length={max_length} tokens"
    many = len(rows) >= MANY
    with Writer(path, SCHEMA) as writer, threads(many):
        bar = tqdm(rows, f"tokenize {path.stem}", unit=" rows", disable=not many or not show_bars())
        batch: list[tuple[Any, ...]] = []
        for place, fitted in enumerate(conversation.truncate_to_fit(tokenizer, bar, max_length)):
            encoded, source = fitted.encoded, fitted.conversation
            if encoded is None:
                reject = Reject(source.row, source.source, "max_length", reason, source.messages)
                too_long.append((reject, fitted.length))
                continue
            labels = [
                i if taught else IGNORE_INDEX for i, taught in zip(encoded.input_ids, encoded.loss_mask, strict=True)
            ]
            batch.append((place, fitted.dropped, fitted.length, encoded.input_ids, labels))
            if len(batch) == conversation.BATCH:
                writer.write(batch_of(batch, SCHEMA))
                batch.clear()
        writer.write(batch_of(batch, SCHEMA))
    return too_long


@contextmanager
def threads(wanted: bool) -> Iterator[None]:
    """Lets the tokenizer use all processors for a while; medtune keeps it to one, for the sake of forked workers."""
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if wanted else before
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def cache_key(tokenizer: PreTrainedTokenizerBase, data: str, max_length: int) -> str:
    """Returns a name for what `tokenize` would make."""
    code = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (conversation, sys.modules[__name__])]
    parts = [data, str(max_length), str(tokenizer.chat_template), tokenizer.backend_tokenizer.to_str(), *code]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
