"""Dropout whose mask is a function of seed, step and layer: the same alone, among others, recomputed and resumed.

The stock dropout draws from the process's generator, so that its mask depends on everything that drew before.
"""

from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from xxhash import xxh3_64_intdigest


class Clock(TrainerCallback):
    """Says which micro-batch a trainer is at: optimizer steps done, and forward passes since."""

    def __init__(self) -> None:
        self.step, self.micro_batch = 0, 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.step, self.micro_batch = state.global_step, 0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.micro_batch += 1


class KeyedDropout(nn.Module):
    """Dropout (arXiv:1207.0580) of share `p`, with a mask made from `seed`, the layer's `name` and the clock alone."""

    def __init__(self, p: float, seed: int, name: str, clock: Clock) -> None:
        super().__init__()
        self.p, self.seed, self.name, self.clock = p, seed, name, clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of any shape with a share p of its elements zero, the others divided by 1 - p; itself in evaluation."""
        if not self.training:
            return x
        key = xxh3_64_intdigest(f"{self.seed}/{self.clock.step}/{self.clock.micro_batch}/{self.name}".encode())
        return cast(torch.Tensor, Drop.apply(x, mask(x, self.p, key), 1 / (1 - self.p)))


def mask(x: torch.Tensor, p: float, key: int) -> torch.Tensor:
    """True for a share `p` of the elements of `x`, the same for the same key."""
    if x.device.type == "cpu":
        # PyTorch's generator takes ten times as long here, an eighth of a training step. p is exact to 1/65,536.
        drawn = np.random.Generator(np.random.SFC64(key)).bytes(2 * x.numel())
        return torch.from_numpy(np.frombuffer(drawn, np.uint16) < round(p * 2**16)).view(x.shape)
    generator = torch.Generator(x.device).manual_seed(key >> 1)
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(p, generator=generator)


class Drop(torch.autograd.Function):
    """Zero where the mask is set, a multiple elsewhere, in one new tensor each way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropped: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(dropped)
        ctx.scale = scale
        return x.masked_fill(dropped, 0).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (dropped,) = ctx.saved_tensors
        return gradient.masked_fill(dropped, 0).mul_(ctx.scale), None, None


def key_dropout(model: PeftModel, seed: int) -> Clock:
    """Replace the dropout of every adapted layer; returns the clock that its trainer must wind, as a callback."""
    clock = Clock()
    for name, module in model.named_modules():
        for adapter, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[adapter] = KeyedDropout(dropout.p, seed, name, clock)
    return clock
