"""Messages -> token ids, and which of them are taught.

The chat template is rendered around placeholders; its own pieces are encoded with control tokens, the contents without.
A control token typed into a message therefore stays text, in training as in chat, and the taught tokens are known
exactly: each answer and the end-of-turn token that follows it. On stripped text the result equals
`tokenizer.apply_chat_template` where no control token is typed, and Meta's reference `ChatFormat` even where one is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from medtune.config import Refusal
from medtune.data import Conversation, Reject

# Private-use characters: no template writes them, and contents never pass through the template.
PLACEHOLDER = "\ue000{}\ue001"
PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")
# Llama 3.2's template prints today's date otherwise, and yesterday's adapter would answer another prompt today.
TEMPLATE_DATE = "26 Jul 2024"


@dataclass
class Encoded:
    """Token ids of a conversation, and for each of them whether the loss is taken on it."""

    input_ids: list[int]
    taught: list[bool]


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
) -> Encoded:
    """Render messages as the model's chat template does.

    Taught are the tokens of every assistant message and the end-of-turn token after it. With `add_generation_prompt`
    the result is the prompt for the next answer. Raises `Refusal` if the template drops a message or has no end-of-turn
    token after an answer.
    """
    blanks = [{**m, "content": PLACEHOLDER.format(i)} for i, m in enumerate(messages)]
    rendered = tokenizer.apply_chat_template(
        blanks, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=TEMPLATE_DATE
    )
    pieces = PLACEHOLDERS.split(str(rendered))  # template, index, template, index, …, template
    if [int(i) for i in pieces[1::2]] != list(range(len(messages))):
        raise Refusal("the model's chat template does not show every message once, in order: use another base model")
    ids: list[int] = []
    taught: list[bool] = []
    ends_turn = False
    for place, piece in enumerate(pieces):
        if place % 2:
            message = messages[int(piece)]
            new = tokenizer(message["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            answer = message["role"] == "assistant"
            mask = [answer] * len(new)
            ends_turn = answer
        else:
            new = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            mask = [False] * len(new)
            if ends_turn:
                if not new or new[0] not in tokenizer.all_special_ids + list(tokenizer.get_added_vocab().values()):
                    raise Refusal("the model's chat template has no end-of-turn token after an answer")
                mask[0] = True
        ids += new
        taught += mask
    return Encoded(ids, taught)


def fit(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], max_length: int
) -> tuple[list[Conversation], list[Reject]]:
    """Shorten conversations to `max_length` tokens by leaving out their earliest exchanges.

    An answer is never cut: where the last question and its answer do not fit, the conversation is rejected. Raises
    `Refusal` if that is all of them.
    """
    fitting, too_long = [], []
    for conversation in conversations:
        system, turns = conversation.messages[:1], conversation.messages[1:]
        while turns and len(encode(tokenizer, system + turns).input_ids) > max_length:
            turns = turns[2:]
        if turns:
            fitting.append(replace(conversation, messages=system + turns))
        else:
            reason = f"whose answer does not fit in trainer.max_length={max_length} tokens"
            too_long.append(Reject(conversation.row, reason, conversation.messages))
    if not fitting:
        raise Refusal(
            f"no conversation fits in trainer.max_length={max_length} tokens: raise it, or shorten data.system_prompt"
        )
    return fitting, too_long


def tokenize(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> Dataset:
    """Turn conversations into the columns that SFTTrainer takes as is: input_ids, and labels (-100: not taught)."""
    rows = []
    for conversation in conversations:
        encoded = encode(tokenizer, conversation.messages)
        labels = [i if keep else -100 for i, keep in zip(encoded.input_ids, encoded.taught, strict=True)]
        rows.append({"input_ids": encoded.input_ids, "labels": labels})
    return Dataset.from_list(rows)
