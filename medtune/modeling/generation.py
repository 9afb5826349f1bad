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

WORTH = 8  # tokens from which recording a step pays


@dataclass
class DecodeState:
    """Rows whose next tokens are known.

    `attention_mask` [rows, tokens seen]; `position_ids` [rows, 1] of the latest that was seen; `chosen` [rows]: the
    next.
    """

    cache: DynamicCache
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    chosen: torch.Tensor


@torch.no_grad()
def greedy(
    model: PeftModel | PreTrainedModel, prompts: Sequence[Sequence[int]], stops: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """The most likely next token, again and again, until one of `stops` (included) or `max_new_tokens`.

    It is what `generate` does, except that only the last position goes through the vocabulary projection as one matrix
    product (there it copies the vocabulary for each row). On a GPU a step is recorded and replayed; elsewhere rows
    leave the batch when they are done.
    """
    base = unwrap_peft(model)
    mode = model.training
    model.eval()
    with autocast_for(base):
        rows = prefill(base, prompts)
        said = None
        if can_be_recorded(base) and max_new_tokens >= WORTH:
            said = replayed(base, rows, stops, max_new_tokens)
        said = said or step_by_step(base, rows, stops, max_new_tokens)
    model.train(mode)
    return said


def can_be_recorded(base: PreTrainedModel) -> bool:
    """Whether a step can: on a GPU, by the attention kernel that takes a mask of any form."""
    takes_mask = base.config._attn_implementation == "sdpa"
    return base.device.type == "cuda" and takes_mask and supports_cuda_graphs(base) and not graphs.CAPTURE_THREAD.failed


def prefill(base: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> DecodeState:
    """Read the prompts, padded on the left."""
    width, device = max(map(len, prompts)), base.device
    input_ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=base.config)
    chosen = next_tokens(
        base, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
    )
    return DecodeState(cache, attention_mask, position_ids[:, -1:], chosen)


def next_tokens(base: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """The most likely token [rows] after those of a pass."""
    last = base.base_model(use_cache=True, **inputs).last_hidden_state[:, -1]
    return base.get_output_embeddings()(last).argmax(-1)


def step_by_step(
    base: PreTrainedModel, rows: DecodeState, stops: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """What each row says; rows leave the batch when they are done."""
    said: list[list[int]] = [[] for _ in rows.chosen]
    speaking = list(range(len(said)))
    attention_mask, position_ids, chosen = rows.attention_mask, rows.position_ids, rows.chosen
    while True:
        interruption.raise_if_requested()
        for place, token in zip(speaking, chosen.tolist(), strict=True):
            said[place].append(token)
        going = [row for row, place in enumerate(speaking) if said[place][-1] not in stops]
        if not going or len(said[speaking[going[0]]]) == max_new_tokens:
            return said
        if len(going) < len(speaking):
            kept = torch.tensor(going, device=base.device)
            rows.cache.batch_select_indices(kept)
            chosen, attention_mask, position_ids = chosen[kept], attention_mask[kept], position_ids[kept]
            speaking = [speaking[row] for row in going]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(speaking), 1)], dim=1)
        position_ids = position_ids + 1
        chosen = next_tokens(
            base,
            input_ids=chosen[:, None],
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=rows.cache,
        )


def replayed(
    base: PreTrainedModel, rows: DecodeState, stops: Sequence[int], max_new_tokens: int
) -> list[list[int]] | None:
    """The same by a recorded step, in which every row stays to the end; None, and `rows` as before, if it cannot be
    recorded."""
    said = [[token] for token in rows.chosen.tolist()]
    step: CapturedStep | None = None
    for _ in range(max_new_tokens - 1):
        interruption.raise_if_requested()
        going = [row for row in range(len(said)) if said[row][-1] not in stops]
        if not going:
            break
        if step is None:
            step = graphs.try_capture("answers", lambda: CapturedStep(base, rows, max_new_tokens).begun())
            if step is None:
                return None
            rows.cache.layers.clear()  # nobody goes on from there any more
        else:
            step.again()
        chosen = step.input_ids[:, 0].tolist()
        for row in going:
            said[row].append(chosen[row])
    return said


class CapturedStep:
    """One token more for every row, in tensors that stay where they are: a graph reads and writes them there."""

    def __init__(self, base: PreTrainedModel, rows: DecodeState, max_new_tokens: int) -> None:
        self.base = base
        self.input_ids, self.position_ids = rows.chosen[:, None].clone(), rows.position_ids + 1
        self.held = StaticKVCache(rows.cache, max_new_tokens)
        # Of every row, what it may look at: [rows, 1, 1, tokens].
        self.visible = F.pad(rows.attention_mask.bool(), (0, max_new_tokens))[:, None, None]

    def begun(self) -> "CapturedStep":
        """Take the first step, and record it as `again` for those that follow. Raises what `graphs.captured` raises."""

        def first() -> Callable[[], None]:
            self.take()
            return graphs.capture(self.take)

        self.again = graphs.CAPTURE_THREAD.run(first)
        return self

    @torch.no_grad()
    def take(self) -> None:
        """Read the latest tokens, and put the next ones in their place."""
        self.visible.index_fill_(3, self.held.place, True)
        with autocast_for(self.base):
            chosen = next_tokens(
                self.base,
                input_ids=self.input_ids,
                attention_mask=self.visible,
                position_ids=self.position_ids,
                past_key_values=self.held,
            )
        self.input_ids.copy_(chosen[:, None])
        self.position_ids.add_(1)
        self.held.place.add_(1)


class StaticKVCache:
    """Keys and values of all layers, with room for `more` tokens, as a cache of transformers'.

    `place` [1]: where those of the next token go.
    """

    def __init__(self, cache: DynamicCache, more: int) -> None:
        layers: list[Any] = cache.layers
        self.layers = [[F.pad(part, (0, 0, 0, more)) for part in (layer.keys, layer.values)] for layer in layers]
        self.place = torch.tensor([layers[0].keys.shape[2]], device=layers[0].keys.device)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> list[torch.Tensor]:
        """Take in one token's [rows, heads, 1, width]; returns all [rows, heads, tokens and room, width]."""
        for whole, part in zip(self.layers[layer], (keys, values), strict=True):
            whole.index_copy_(2, self.place, part)
        return self.layers[layer]
