"""Prompts -> the most likely tokens after them, many rows at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from medtune.modeling import cuda_graphs as graphs
from medtune.modeling.loss import autocast_for, unwrap_peft
from medtune.modeling.quantized import supports_cuda_graphs
from medtune.runtime import interruption

MIN_CAPTURE_TOKENS = 8  # new tokens from which capturing a step pays


@torch.no_grad()
def greedy(
    model: PeftModel | PreTrainedModel, prompts: Sequence[Sequence[int]], stops: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """Returns for each prompt the most likely next tokens, up to one of `stops` (included) or `max_new_tokens`.

    The tokens are those of `generate`. That copies the vocabulary projection for each row; here the last positions go
    through it in one matrix product. On a GPU a step is captured and replayed. Elsewhere rows leave the batch when they
    end.
    """
    base = unwrap_peft(model)
    mode = model.training
    model.eval()
    with autocast_for(base):
        state = prefill(base, prompts)
        answers = None
        if can_capture(base) and max_new_tokens >= MIN_CAPTURE_TOKENS:
            answers = decode_captured(base, state, stops, max_new_tokens)
        if answers is None:
            answers = decode(base, state, stops, max_new_tokens)
    model.train(mode)
    return answers


def can_capture(base: PreTrainedModel) -> bool:
    """Returns whether a step can be captured: on a GPU, by the attention kernel that takes a mask of any form."""
    takes_mask = base.config._attn_implementation == "sdpa"
    return base.device.type == "cuda" and takes_mask and supports_cuda_graphs(base) and not graphs.CAPTURE_THREAD.failed


@dataclass
class DecodeState:
    """A batch of rows whose next tokens are known, and not yet in the cache.

    `attention_mask` [rows, tokens in the cache]; `position_ids` [rows, 1] of the latest of these; `next_ids` [rows].
    """

    cache: DynamicCache
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    next_ids: torch.Tensor

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows."""
        kept = torch.tensor(rows, device=self.next_ids.device)
        self.cache.batch_select_indices(kept)
        self.next_ids, self.attention_mask = self.next_ids[kept], self.attention_mask[kept]
        self.position_ids = self.position_ids[kept]

    def step(self, base: PreTrainedModel) -> None:
        """Puts the next tokens into the cache, and finds those after them."""
        seen = self.attention_mask.new_ones(len(self.next_ids), 1)
        self.attention_mask = torch.cat([self.attention_mask, seen], dim=1)
        self.position_ids = self.position_ids + 1
        self.next_ids = next_tokens(
            base,
            input_ids=self.next_ids[:, None],
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            past_key_values=self.cache,
        )


def prefill(base: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> DecodeState:
    """Runs the prompts, padded on the left, through the model."""
    width, device = max(map(len, prompts)), base.device
    input_ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=base.config)
    next_ids = next_tokens(
        base, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
    )
    return DecodeState(cache, attention_mask, position_ids[:, -1:], next_ids)


def next_tokens(base: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Returns the most likely token [rows] after those of a pass."""
    last = base.base_model(use_cache=True, **inputs).last_hidden_state[:, -1]
    return base.get_output_embeddings()(last).argmax(-1)


def decode(base: PreTrainedModel, state: DecodeState, stops: Sequence[int], max_new_tokens: int) -> list[list[int]]:
    """Returns each row's new tokens; rows leave the batch when they end."""
    answers: list[list[int]] = [[] for _ in state.next_ids]
    active = list(answers)  # of the rows that are still in the batch
    while True:
        interruption.raise_if_requested()
        for answer, token in zip(active, state.next_ids.tolist(), strict=True):
            answer.append(token)
        going = [row for row, answer in enumerate(active) if answer[-1] not in stops]
        if not going or len(active[going[0]]) == max_new_tokens:
            return answers
        if len(going) < len(active):
            state.keep(going)
            active = [active[row] for row in going]
        state.step(base)


def decode_captured(
    base: PreTrainedModel, state: DecodeState, stops: Sequence[int], max_new_tokens: int
) -> list[list[int]] | None:
    """Returns each row's new tokens, by a captured step in which every row stays to the end.

    Returns None, and leaves `state` as it was, if the step cannot be captured.
    """
    answers = [[token] for token in state.next_ids.tolist()]
    step: CapturedStep | None = None
    for _ in range(max_new_tokens - 1):
        interruption.raise_if_requested()
        going = [row for row, answer in enumerate(answers) if answer[-1] not in stops]
        if not going:
            break
        if step is None:
            step = graphs.try_capture("answers", lambda: CapturedStep(base, state, max_new_tokens).capture())
            if step is None:
                return None
            state.cache.layers.clear()  # the captured step has a copy
        else:
            step.replay()
        next_ids = step.input_ids[:, 0].tolist()
        for row in going:
            answers[row].append(next_ids[row])
    return answers


class CapturedStep:
    """One more token for every row. The graph reads and writes tensors at fixed addresses."""

    def __init__(self, base: PreTrainedModel, state: DecodeState, max_new_tokens: int) -> None:
        self.base = base
        self.input_ids, self.position_ids = state.next_ids[:, None].clone(), state.position_ids + 1
        self.cache = StaticKVCache(state.cache, max_new_tokens)
        # What each row attends to: [rows, 1, 1, tokens].
        self.visible = F.pad(state.attention_mask.bool(), (0, max_new_tokens))[:, None, None]

    def capture(self) -> "CapturedStep":
        """Runs the first step, and captures it as `replay` for those after it.

        Raises what `cuda_graphs.capture` raises.
        """

        def run_and_capture() -> Callable[[], None]:
            self.run()
            return graphs.capture(self.run)

        self.replay = graphs.CAPTURE_THREAD.run(run_and_capture)
        return self

    @torch.no_grad()
    def run(self) -> None:
        """Reads the latest tokens, and overwrites them with the next ones."""
        self.visible.index_fill_(3, self.cache.position, True)
        with autocast_for(self.base):
            next_ids = next_tokens(
                self.base,
                input_ids=self.input_ids,
                attention_mask=self.visible,
                position_ids=self.position_ids,
                past_key_values=self.cache,
            )
        self.input_ids.copy_(next_ids[:, None])
        self.position_ids.add_(1)
        self.cache.position.add_(1)


class StaticKVCache:
    """Keys and values of all layers, with room for `more` tokens; transformers takes it for a cache of its own.

    `position` [1]: where those of the next token go.
    """

    def __init__(self, cache: DynamicCache, more: int) -> None:
        layers: list[Any] = cache.layers
        self.layers = [[F.pad(part, (0, 0, 0, more)) for part in (layer.keys, layer.values)] for layer in layers]
        self.position = torch.tensor([layers[0].keys.shape[2]], device=layers[0].keys.device)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> list[torch.Tensor]:
        """Stores one token's keys and values [rows, heads, 1, width].

        Returns those of all tokens [rows, heads, tokens and room, width].
        """
        for whole, part in zip(self.layers[layer], (keys, values), strict=True):
            whole.index_copy_(2, self.position, part)
        return self.layers[layer]
