"""Token ids, as the collator hands them to the model -> proof of what is taught, or a refusal, before step 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from medtune.data.store import ConversationTable
from medtune.data.tokenization.chat_template import TEMPLATE_DATE, drop_first_turns, encode, encode_contents
from medtune.data.tokenization.dataset import IGNORE_INDEX
from medtune.runtime.errors import UserError

CHECKED = 1000  # conversations of a split that are taken apart, spread evenly over it
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass
class MaskReport:
    """What was checked, and counts over it; `taught_share` is of all tokens that are not padding."""

    checked: int
    of: int
    answers: int
    tokens: int
    taught_tokens: int
    shortened: int
    control_tokens_typed: int

    @property
    def taught_share(self) -> float:
        """Share of the tokens that the loss is taken on."""
        return self.taught_tokens / self.tokens

    def __str__(self) -> str:
        line = (
            f"{self.taught_share:.1%} of the tokens are taught: {self.answers} whole answers, each with its end of turn"
        )
        if self.checked < self.of:
            line += f" (checked {self.checked} of {self.of} conversations)"
        if self.shortened:
            line += f"; {self.shortened} conversations lost early turns to fit"
        if self.control_tokens_typed:
            line += f"; {self.control_tokens_typed} have control tokens typed in them, kept as text"
        return line


def verify_mask(
    tokenizer: PreTrainedTokenizerBase,
    collate: Collate,
    splits: Sequence[tuple[Dataset, ConversationTable]],
    stop_tokens: Sequence[str],
    batch_size: int = 8,
) -> MaskReport:
    """Take conversations apart as the trainer will see them, and hold them against what they should be.

    `collate` is the trainer's own collator; `splits` are token ids beside the conversations they come from. Checked:
    the collator changes no token and teaches no padding; there is one begin-of-text at most; up to every answer the
    tokens are those of the prompt that inference builds, by the stock chat template too; taught are exactly the
    answer's own tokens, none cut or lost, and a stop token after them. Raises `Refusal`, naming the first row that
    fails.
    """
    stops = {int(cast(int, tokenizer.convert_tokens_to_ids(token))) for token in stop_tokens}
    proof = MaskReport(0, sum(len(tokens) for tokens, _ in splits), 0, 0, 0, 0, 0)
    for tokens, conversations in splits:
        places = range(0, len(tokens), max(1, -(-len(tokens) // CHECKED)))
        for start in range(0, len(places), batch_size):
            rows = [tokens[place] for place in places[start : start + batch_size]]
            batch = collate([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
            for i, row in enumerate(rows):
                conversation = conversations[row["place"]]
                real = batch["attention_mask"][i].bool()
                ids, labels = batch["input_ids"][i], batch["labels"][i]
                messages = drop_first_turns(conversation.messages, row["dropped"])
                problem = None
                if (labels[~real] != IGNORE_INDEX).any():
                    problem = "padding is in the loss"
                elif ids[real].tolist() != row["input_ids"]:
                    problem = "the collator changes tokens"
                else:
                    problem = mask_problem(tokenizer, messages, row["input_ids"], labels[real].tolist(), stops)
                if problem:
                    raise UserError(f"mask proof: {conversation.source}, row {conversation.row}: {problem}")
                proof.checked += 1
                proof.answers += sum(m["role"] == "assistant" for m in messages)
                proof.tokens += len(row["input_ids"])
                proof.taught_tokens += int((labels != IGNORE_INDEX).sum())
                proof.shortened += row["dropped"] > 0
                proof.control_tokens_typed += has_control_token(tokenizer, messages)
    return proof


def mask_problem(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    ids: list[int],
    labels: list[int],
    stops: set[int],
) -> str | None:
    """What is wrong with a conversation's tokens and labels; None if nothing is."""
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
        expected[len(prompt) : end + 1] = ids[len(prompt) : end + 1]
    if labels != expected:
        wrong = next(i for i, (a, b) in enumerate(zip(labels, expected, strict=True)) if a != b)
        what = "outside the loss" if labels[wrong] == IGNORE_INDEX else "in the loss"
        return f"token {wrong} ({tokenizer.decode([ids[wrong]])!r}) is {what}"
    return None


def stock_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """The prompt as `apply_chat_template` alone gives it, which is what other programs use for inference."""
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=False, date_string=TEMPLATE_DATE
    )
    return cast(list[int], ids)


def has_control_token(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> bool:
    """Whether a control token is typed in a message, where the stock template would obey it."""
    control = tokenizer.get_added_vocab()
    return any(token in message["content"] for message in messages for token in control)
