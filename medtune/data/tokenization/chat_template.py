"""Messages -> token ids, and which of them are target tokens.

The chat template is rendered around placeholders; its own pieces are encoded with control tokens, the contents without.
A control token typed into a message therefore stays text, in training as in chat, and the target tokens are known
exactly: each answer and the end-of-turn token that follows it. On stripped text the result equals
`tokenizer.apply_chat_template` where no control token is typed, and Meta's reference `ChatFormat` even where one is.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from medtune.data.reading.turns import Message, Messages
from medtune.data.store import Conversation
from medtune.runtime.errors import UserError

# Private-use characters: no template writes them, and contents never pass through the template.
PLACEHOLDER = "\ue000{}\ue001"
PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")
# Templates print today's date otherwise, by one name or the other, and yesterday's adapter would answer another prompt
# today. The date is the default of Llama 3.2's template.
PINNED_DATE = datetime(2024, 7, 26)
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
BATCH = 500  # conversations encoded at a time


@dataclass
class Encoded:
    """Token ids of a conversation, and for each of them whether the loss is taken on it."""

    input_ids: list[int]
    loss_mask: list[bool]


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> Encoded:
    """Renders messages as the model's chat template does.

    Target tokens are those of every assistant message and the end-of-turn token after it, unless its weight is 0. With
    `add_generation_prompt` the result is the prompt for the next answer. Raises `UserError` if the template drops a
    message or has no end-of-turn token after an answer.
    """
    return render_ids(tokenizer, messages, encode_contents(tokenizer, messages), add_generation_prompt)


def encode_contents(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[list[int]]:
    """Returns token ids of each message's content; control tokens typed in it stay text."""
    texts = [message["content"] for message in messages]
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def render_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    contents: Sequence[list[int]],
    add_generation_prompt: bool = False,
) -> Encoded:
    """Puts the template's own tokens around the contents of messages."""
    roles = tuple(message["role"] for message in messages)
    frame = template_pieces(tokenizer, str(tokenizer.chat_template), roles, add_generation_prompt)
    ids, loss_mask = list(frame[0]), [False] * len(frame[0])
    for message, content, piece in zip(messages, contents, frame[1:], strict=True):
        answer = is_target(message)
        ids += [*content, *piece]
        loss_mask += [answer] * len(content) + [answer and place == 0 for place in range(len(piece))]
    return Encoded(ids, loss_mask)


def is_target(message: Message) -> bool:
    """Returns whether a message is an answer that is trained on."""
    return message["role"] == "assistant" and message.get("weight") != 0


@lru_cache(maxsize=256)
def template_pieces(
    tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...], add_generation_prompt: bool
) -> list[list[int]]:
    """Returns the template's own token ids before, between and after the contents of messages with these roles.

    `template` is the tokenizer's, named so that a change of it is seen. Raises `UserError` as `encode` does.
    """
    blanks = [{"role": role, "content": PLACEHOLDER.format(i)} for i, role in enumerate(roles)]
    rendered = apply_template(tokenizer, blanks, add_generation_prompt, tokenize=False)
    pieces = PLACEHOLDERS.split(str(rendered))  # template, index, template, index, …, template
    if [int(i) for i in pieces[1::2]] != list(range(len(roles))):
        raise UserError("the model's chat template does not show every message once, in order: use another base model")
    frame = [tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else [] for piece in pieces[::2]]
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for role, piece in zip(roles, frame[1:], strict=True):
        if role == "assistant" and (not piece or piece[0] not in control):
            raise UserError("the model's chat template has no end-of-turn token after an answer")
    return frame


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool, tokenize: bool
) -> Any:
    """Returns what `apply_chat_template` makes of messages: text, or token ids.

    Raises `UserError` where the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tokenize=tokenize,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
            chat_template=with_pinned_date(str(tokenizer.chat_template)),
            date_string=PINNED_DATE.strftime("%d %b %Y"),
        )
    except TemplateError as error:
        raise UserError(
            f"the model's chat template refuses a conversation of {', '.join(m['role'] for m in messages[:3])} "
            f"({' '.join(str(error).split())[:100]}): choose a base model whose template takes a system message"
        ) from None


@lru_cache(maxsize=16)
def with_pinned_date(template: str) -> str:
    """Returns a chat template that writes the pinned date where it would write today's.

    Raises `UserError` where it asks for today in a form that is not known.
    """
    pinned = TODAY.sub(lambda call: repr(PINNED_DATE.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", pinned):
        raise UserError(
            "the model's chat template writes today's date in a form that cannot be pinned: tomorrow the adapter would "
            "answer another prompt; choose another base model, or a copy whose template has no date"
        )
    return pinned


def drop_first_turns(messages: Sequence[Message], dropped: int) -> Messages:
    """Returns a conversation without its earliest `dropped` messages; the system message stays."""
    return [*messages[:1], *messages[1 + dropped :]]


@dataclass
class Truncated:
    """A conversation as token ids, or None where its last answer does not fit.

    `dropped`: earliest messages left out; `length`: in tokens, before that.
    """

    conversation: Conversation
    encoded: Encoded | None
    dropped: int
    length: int

    @property
    def messages(self) -> Messages:
        """The messages that the tokens stand for."""
        return drop_first_turns(self.conversation.messages, self.dropped)


def truncate_to_fit(
    tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Conversation], max_length: int
) -> Iterator[Truncated]:
    """Encodes conversations in `max_length` tokens by leaving out their earliest exchanges.

    An answer is never cut: where the last question and its answer do not fit, there are no tokens.
    """
    waiting = iter(conversations)
    while batch := list(islice(waiting, BATCH)):
        # One call for all texts of a batch: a call costs as much as fifty words.
        contents = iter(encode_contents(tokenizer, [m for c in batch for m in c.messages]))
        for conversation in batch:
            own = list(islice(contents, len(conversation.messages)))
            messages, length = conversation.messages, 0
            for dropped in range(0, len(messages) - 1, 2):
                encoded = render_ids(tokenizer, drop_first_turns(messages, dropped), own[:1] + own[1 + dropped :])
                length = length or len(encoded.input_ids)
                if len(encoded.input_ids) <= max_length:
                    yield Truncated(conversation, encoded, dropped, length)
                    break
            else:
                yield Truncated(conversation, None, len(messages) - 1, length)
