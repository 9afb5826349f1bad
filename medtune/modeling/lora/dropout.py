"""Dropout whose mask is a function of seed, step and layer: the same alone, among others, recomputed and resumed.

The stock dropout draws from the process's generator, so that its mask depends on everything that drew before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from xxhash import xxh3_64_intdigest

from medtune.modeling import kernels
from medtune.runtime.errors import UserError


@dataclass
class MaskSeeds:
    """A mask that is nowhere: a kernel makes it again wherever it is applied.

    `keys` (int64) and `shares` (float32) [members]: what each member's mask is made from, and the share it drops.
    `layer` tells layers apart; `length`: of a row, in tokens.
    """

    keys: torch.Tensor
    shares: torch.Tensor
    layer: int
    length: int


Mask = (
    torch.Tensor | MaskSeeds | None
)  # of a tensor [members, tokens, width]: 1 where it stays (uint8), keys, or all stays


class DropoutStep(TrainerCallback):
    """What the masks of a trainer's micro-batch are made from: seed, optimizer steps done, forward passes since."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step, self.micro_batch = 0, 0
        self.told: tuple[int, int] | None = None  # the step and micro-batch that the GPU's key is of
        self.on_gpu: tuple[torch.Tensor, torch.Tensor] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.step, self.micro_batch = state.global_step, 0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.micro_batch += 1

    def key(self, name: str) -> int:
        """63 bits for a layer of that name in this micro-batch."""
        return xxh3_64_intdigest(f"{self.seed}/{self.step}/{self.micro_batch}/{name}".encode()) >> 1

    def keys(self, p: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The key that all layers share in this micro-batch, and the share they drop [1], told to the GPU once; the
        tensors stay the same ones."""
        if self.on_gpu is None:
            self.on_gpu = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([p], device=device)
        now = self.step, self.micro_batch
        if self.told != now:
            self.on_gpu[0].fill_(self.key(""))
            self.told = now
        return self.on_gpu


class KeyedDropout(nn.Module):
    """Dropout (arXiv:1207.0580) of share `p` with a mask made from the layer's `name` and the clock alone."""

    def __init__(self, p: float, name: str, clock: DropoutStep) -> None:
        super().__init__()
        self.p, self.name, self.clock = p, name, clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, length, width] with a share p of its elements zero, the others divided by 1 - p; itself in
        evaluation."""
        if not self.training:
            return x
        ones = torch.ones_like(x).view(1, -1, x.shape[-1])
        return x * apply_mask(ones, self.mask(x)).view_as(x) / (1 - self.p)

    def mask(self, x: torch.Tensor) -> Mask:
        """What this micro-batch keeps of `x` [rows, length, width], for `x` as one member [1, rows * length, width]."""
        if x.device.type == "cpu":
            return random_mask(self.clock.key(self.name), self.p, x.shape).view(1, -1, x.shape[-1])
        return MaskSeeds(*self.clock.keys(self.p, x.device), layer_number(self.name), x.shape[-2])


def random_mask(key: int, p: float, shape: Sequence[int]) -> torch.Tensor:
    """0 for a share p of the elements, 1 for the others (uint8, [shape]), on the CPU. p is exact to 1/65,536."""
    # PyTorch's generator takes thirty times as long here, a third of a training step.
    count = math.prod(shape)
    numbers = np.random.SFC64(key).random_raw(math.ceil(count / 4)).view(np.uint16)[:count]
    return torch.from_numpy((numbers >= round(p * 2**16)).view(np.uint8)).view(*shape)


def apply_mask(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    """`x` [members, tokens, width] without what is dropped."""
    if mask is None:
        return x
    if isinstance(mask, torch.Tensor):
        return x * mask.to(x.dtype)  # masked_fill takes twice as long on a CPU
    from medtune.modeling.kernels.dropout import drop

    return drop(x, mask.keys, mask.shares, mask.layer, mask.length)


def dropout_matmul(x: torch.Tensor, a: torch.Tensor, mask: Mask) -> torch.Tensor:
    """The product [members, tokens, r] of `x` [members, tokens, width] without what is dropped, and `a` [members, r,
    width] transposed."""
    if isinstance(mask, MaskSeeds):
        from medtune.modeling.kernels.dropout import MANY, MOST, multiply_dropped

        if a.shape[1] <= MOST and x.shape[0] * x.shape[1] >= MANY:
            return multiply_dropped(x, a, mask.keys, mask.shares, mask.layer, mask.length)
    return torch.bmm(apply_mask(x, mask), a.mT)


def dropout_matmul_backward(
    of_low: torch.Tensor, x: torch.Tensor, a: torch.Tensor, mask: Mask
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `x` from that of `multiplied`, `of_low` [members, tokens, r]; and `x` without what is dropped."""
    if isinstance(mask, MaskSeeds):
        from medtune.modeling.kernels.dropout import MOST, differentiate_dropped

        if a.shape[1] <= MOST:
            return differentiate_dropped(of_low, x, a, mask.keys, mask.shares, mask.layer, mask.length)
    return apply_mask(torch.bmm(of_low, a), mask), apply_mask(x, mask)


def require_kernel(device: torch.device) -> None:
    """Raises `UserError` on a GPU where Triton cannot build the kernel."""
    if device.type == "cuda" and not kernels.kernels_available():
        raise UserError(
            "lora.lora_dropout on a GPU needs Triton and a C compiler: pip install triton, apt-get install gcc "
            "python3-dev; or leave dropout out with lora.lora_dropout=0"
        )


def layer_number(name: str) -> int:
    """31 bits that tell layers apart."""
    return xxh3_64_intdigest(name.encode()) >> 33


def key_dropout(model: PeftModel, seed: int) -> DropoutStep:
    """Replace the dropout of every adapted layer; returns the clock that its trainer must wind, as a callback."""
    clock = DropoutStep(seed)
    for name, module in model.named_modules():
        for adapter, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[adapter] = KeyedDropout(dropout.p, name, clock)
    return clock
