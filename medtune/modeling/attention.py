"""Which attention kernel runs, and when."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from medtune.config.enums import Attention
from medtune.config.schema import Model

CAUSAL = "medtune_causal"  # for rows padded on the right: transformers makes no mask for a name it does not know
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def eval_attention(attention: Attention) -> str:
    """The attention kernel as transformers calls it, outside of training."""
    return "sdpa" if attention is Attention.auto else attention.name


def train_attention(model: Model, max_length: int, device: torch.device) -> str:
    """The attention kernel in training: on a CPU a step with eager attention takes 0.7 of the time with sdpa.

    It holds the whole matrix of attention, so it is left to rows of up to 1,024 tokens. On a GPU it is sdpa without a
    mask, which has the faster kernels: rows are padded on the right, where no token looks.
    """
    eager = model.attn_implementation is Attention.auto and device.type == "cpu" and max_length <= 1024
    chosen = "eager" if eager else eval_attention(model.attn_implementation)
    return CAUSAL if chosen == "sdpa" and device.type == "cuda" else chosen


@contextmanager
def use_attention(base: PreTrainedModel, with_kernel: str) -> Iterator[None]:
    """Another attention kernel, while it lasts; it is looked up at every forward pass, also at a recomputed one."""
    before = base.config._attn_implementation
    base.config._attn_implementation = with_kernel
    try:
        yield
    finally:
        base.config._attn_implementation = before
