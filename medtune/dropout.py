"""Dropout whose mask is a function of seed, step and layer: the same alone, among others, recomputed and resumed.

The stock dropout draws from the process's generator, so that its mask depends on everything that drew before.
"""

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
        key = f"{self.seed}/{self.clock.step}/{self.clock.micro_batch}/{self.name}"
        # The CPU's generator reads 32 bits of its seed.
        generator = torch.Generator(x.device).manual_seed(xxh3_64_intdigest(key.encode()) & 0xFFFFFFFF)
        dropped = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(self.p, generator=generator)
        return (x * (1 / (1 - self.p))).masked_fill(dropped, 0)


def key_dropout(model: PeftModel, seed: int) -> Clock:
    """Replace the dropout of every adapted layer; returns the clock that its trainer must wind, as a callback."""
    clock = Clock()
    for name, module in model.named_modules():
        for adapter, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[adapter] = KeyedDropout(dropout.p, seed, name, clock)
    return clock
