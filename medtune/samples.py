"""At each evaluation, answers to a fixed list of questions, so that anyone can read what training does.

The questions, their order and the greedy decoding are the same at every step and for every member: rows compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.config import Data, Samples
from medtune.conversation import encode
from medtune.data.normalize import Messages


@dataclass
class Question:
    """A conversation that waits for an answer, and the doctor's own answer where there is one."""

    messages: list[dict[str, str]]
    reference: str

    @property
    def prompt(self) -> str:
        """The patient's words; in a longer conversation with the doctor's turns between them."""
        turns = [m for m in self.messages if m["role"] != "system"]
        if len(turns) == 1:
            return turns[0]["content"]
        speakers = {"user": "Patient", "assistant": "Doctor"}
        return "\n".join(f"{speakers[m['role']]}: {m['content']}" for m in turns)


@dataclass
class Answer:
    """What the model said: text up to the stop token, why it ended (end_of_turn or length), tokens generated."""

    text: str
    stop: str
    tokens: int


def questions(samples: Samples, data: Data, validation: Sequence[Messages]) -> list[Question]:
    """The configured prompts, then the last question of the first `validation` conversations."""
    system = {"role": "system", "content": data.system_prompt.strip()}
    fixed = [Question([system, {"role": "user", "content": prompt.strip()}], "") for prompt in samples.prompts]
    held_out = [Question(messages[:-1], messages[-1]["content"]) for messages in validation[: samples.held_out]]
    return fixed + held_out


@torch.no_grad()
def answer(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    max_new_tokens: int,
) -> list[Answer]:
    """Answer all questions greedily in one left-padded batch; prompts are rendered as in training.

    An answer ends at the first token of the model's stop list, or after `max_new_tokens`.
    """
    prompts = [encode(tokenizer, q.messages, add_generation_prompt=True).input_ids for q in asked]
    width = max(map(len, prompts))
    padding = [width - len(ids) for ids in prompts]
    input_ids = torch.tensor([[tokenizer.pad_token_id] * n + ids for n, ids in zip(padding, prompts, strict=True)])
    attention_mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
    mode = model.training
    model.eval()
    generated: torch.Tensor = model.generate(  # type: ignore[operator]
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
    )
    model.train(mode)
    stops = set(model.generation_config.eos_token_id)
    return [read_answer(tokenizer, row[width:].tolist(), stops) for row in generated]


def read_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: set[int]) -> Answer:
    """Cut a generated row at its first stop token; control tokens before it stay visible in the text."""
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=False)).strip()
    return Answer(text, "length" if end is None else "end_of_turn", len(ids[:end]))
