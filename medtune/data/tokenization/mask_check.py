"""Token ids as the collator hands them to the model -> a report on the loss mask, or an error, before step 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from medtune.data.reading.turns import Message
from medtune.data.store import ConversationTable
from medtune.data.tokenization.chat_template import (
    apply_template,
    drop_first_turns,
    encode,
    encode_contents,
    is_target,
)
from medtune.data.tokenization.dataset import IGNORE_INDEX
from medtune.runtime.errors import UserError

CHECKED = 1000  # conversations of a split that are checked, spread evenly over it
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass
class MaskReport:
    """What was checked, and counts over it. `tokens` are those that are not padding."""

    checked: int
    of: int
    answers: int
    tokens: int
    target_tokens: int
    truncated: int
    control_tokens_typed: int

    @property
    def target_share(self) -> float:
        """Share of the tokens that the loss is taken on."""
        return self.target_tokens / self.tokens

    def as_json(self) -> dict[str, Any]:
        """Returns the report with the names that run.json has for it."""
        return {
            "checked": self.checked,
            "of": self.of,
            "answers": self.answers,
            "tokens": self.tokens,
            "taught_tokens": self.target_tokens,
            "shortened": self.truncated,
            "control_tokens_typed": self.control_tokens_typed,
            "taught_share": self.target_share,
        }

    def __str__(self) -> str:
        line = (
            f"loss on {self.target_share:.1%} of tokens ({self.answers} complete answers with their end-of-turn token)"
        )
        if self.checked < self.of:
            line += f"; checked {self.checked} of {self.of} conversations"
        if self.truncated:
            line += f"; {count(self.truncated, 'conversation')} truncated"
        if self.control_tokens_typed:
            line += f"; control tokens typed in {count(self.control_tokens_typed, 'conversation')}, kept as text"
        return line


def count(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural where it is not one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def verify_mask(
    tokenizer: PreTrainedTokenizerBase,
    collate: Collate,
    splits: Sequence[tuple[Dataset, ConversationTable]],
    stop_tokens: Sequence[str],
    batch_size: int = 8,
) -> MaskReport:
    """Checks conversations as the trainer will see them against what they should be.

    `collate` is the trainer's own collator. `splits` are token ids beside their conversations. Checked are:
    the collator changes no token and puts no padding in the loss; there is at most one begin-of-text token; up to every
    answer the tokens are those of the prompt that inference builds, by the stock chat template too; in the loss are
    exactly the answer's own tokens, none cut or lost, and a stop token after them, unless its weight is 0.

    Raises `UserError` that names the first row that fails.
    """
    stops = {int(cast(int, tokenizer.convert_tokens_to_ids(token))) for token in stop_tokens}
    report = MaskReport(0, sum(len(tokens) for tokens, _ in splits), 0, 0, 0, 0, 0)
    for tokens, conversations in splits:
        indices = range(0, len(tokens), max(1, -(-len(tokens) // CHECKED)))
        for start in range(0, len(indices), batch_size):
            rows = [tokens[index] for index in indices[start : start + batch_size]]
            batch = collate([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
            for i, row in enumerate(rows):
                conversation = conversations[row["place"]]
                messages = drop_first_turns(conversation.messages, row["dropped"])
                problem = batch_problem(batch, i, row) or mask_problem(
                    tokenizer, messages, row["input_ids"], unpadded(batch, "labels", i), stops
                )
                if problem:
                    raise UserError(f"mask proof: {conversation.source}, row {conversation.row}: {problem}")
                report.checked += 1
                report.answers += sum(map(is_target, messages))
                report.tokens += len(row["input_ids"])
                report.target_tokens += int((batch["labels"][i] != IGNORE_INDEX).sum())
                report.truncated += row["dropped"] > 0
                report.control_tokens_typed += has_control_token(tokenizer, messages)
    return report


def unpadded(batch: dict[str, Any], column: str, i: int) -> list[int]:
    """Returns one column of row `i` of a batch, without its padding."""
    return batch[column][i][batch["attention_mask"][i].bool()].tolist()


def batch_problem(batch: dict[str, Any], i: int, row: dict[str, Any]) -> str | None:
    """Returns what is wrong with row `i` of a batch beside the row that it was made of; None if nothing is."""
    padding = ~batch["attention_mask"][i].bool()
    if (batch["labels"][i][padding] != IGNORE_INDEX).any():
        return "padding is in the loss"
    if unpadded(batch, "input_ids", i) != row["input_ids"]:
        return "the collator changes tokens"
    return None


def mask_problem(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    ids: list[int],
    labels: list[int],
    stops: set[int],
) -> str | None:
    """Returns what is wrong with a conversation's tokens and labels; None if nothing is."""
    if all(label == IGNORE_INDEX for label in labels):
        return "no token is in the loss"
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        return "it begins with two begin-of-text tokens"
    expected = [IGNORE_INDEX] * len(ids)
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode(tokenizer, messages[:place], add_generation_prompt=True).input_ids
        if ids[: len(prompt)] != prompt:
            return (
                f"before answer {place // 2} the tokens are not those of the inference prompt: roles or template differ"
            )
        if not has_control_token(tokenizer, messages[:place]) and prompt != stock_prompt(tokenizer, messages[:place]):
            return f"before answer {place // 2} the tokens are not those of the stock chat template"
        answer = encode_contents(tokenizer, [message])[0]
        end = len(prompt) + len(answer)
        if ids[len(prompt) : end] != answer:
            return f"answer {place // 2} is cut or changed"
        if end >= len(ids) or ids[end] not in stops:
            return f"answer {place // 2} does not end with one of model.stop_tokens"
        if is_target(message):
            expected[len(prompt) : end + 1] = ids[len(prompt) : end + 1]
    if labels != expected:
        wrong = next(i for i, (a, b) in enumerate(zip(labels, expected, strict=True)) if a != b)
        what = "outside the loss" if labels[wrong] == IGNORE_INDEX else "in the loss"
        return f"token {wrong} ({tokenizer.decode([ids[wrong]])!r}) is {what}"
    return None


def stock_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Returns the prompt as `apply_chat_template` alone gives it, which is what other programs use for inference."""
    return cast(list[int], apply_template(tokenizer, messages, add_generation_prompt=True, tokenize=True))


def has_control_token(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    """Returns whether a control token is typed in a message, where the stock template would obey it."""
    control = tokenizer.get_added_vocab()
    return any(token in message["content"] for message in messages for token in control)
