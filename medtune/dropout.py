"""Dropout whose mask is a function of seed, step and layer: the same alone, among others, recomputed and resumed.

The stock dropout draws from the process's generator, so that its mask depends on everything that drew before.
"""

import math

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
        return x * self.mask(x).to(x.dtype) / (1 - self.p) if self.training else x

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """0 for the share p of the elements of `x` that this micro-batch drops, 1 for the others (uint8, [...])."""
        key = xxh3_64_intdigest(f"{self.seed}/{self.clock.step}/{self.clock.micro_batch}/{self.name}".encode())
        if x.device.type == "cpu":
            # PyTorch's generator takes thirty times as long here, a third of a training step. p is exact to 1/65,536.
            drawn = np.random.SFC64(key).random_raw(math.ceil(x.numel() / 4)).view(np.uint16)[: x.numel()]
            return torch.from_numpy((drawn >= round(self.p * 2**16)).view(np.uint8)).view(x.shape)
        generator = torch.Generator(x.device).manual_seed(key >> 1)
        return torch.empty(x.shape, dtype=torch.uint8, device=x.device).bernoulli_(1 - self.p, generator=generator)


def key_dropout(model: PeftModel, seed: int) -> Clock:
    """Replace the dropout of every adapted layer; returns the clock that its trainer must wind, as a callback."""
    clock = Clock()
    for name, module in model.named_modules():
        for adapter, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[adapter] = KeyedDropout(dropout.p, seed, name, clock)
    return clock
