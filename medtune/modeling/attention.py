"""Which attention kernel runs, and when."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from medtune.config.enums import Attention
from medtune.config.schema import Model

# sdpa for rows padded on the right: transformers makes no mask for a kernel whose name it does not know.
CAUSAL = "medtune_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)

MAX_EAGER_LENGTH = 1024  # tokens: eager attention holds the whole attention matrix


def eval_attention(attention: Attention) -> str:
    """Returns transformers' name of the attention kernel outside of training."""
    return "sdpa" if attention is Attention.auto else attention.name


def train_attention(model: Model, max_length: int, device: torch.device) -> str:
    """Returns transformers' name of the attention kernel in training.

    On a CPU eager attention is faster, and serves short rows. On a GPU it is sdpa without a mask, which has the faster
    kernels: rows are padded on the right, where no token attends.
    """
    short = max_length <= MAX_EAGER_LENGTH
    eager = model.attn_implementation is Attention.auto and device.type == "cpu" and short
    kernel = "eager" if eager else eval_attention(model.attn_implementation)
    return CAUSAL if kernel == "sdpa" and device.type == "cuda" else kernel


@contextmanager
def use_attention(base: PreTrainedModel, kernel: str) -> Iterator[None]:
    """Uses another attention kernel for a while. Every forward pass looks it up, a recomputed one too."""
    before = base.config._attn_implementation
    base.config._attn_implementation = kernel
    try:
        yield
    finally:
        base.config._attn_implementation = before
