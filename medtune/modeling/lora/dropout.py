"""Dropout whose mask is a function of seed, step and layer: the same alone, among others, recomputed and resumed.

The stock dropout draws from the process's generator: its mask depends on everything that drew before.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from xxhash import xxh3_64_intdigest

from medtune.modeling import kernels
from medtune.modeling.kernels import MaskSeeds
from medtune.runtime.errors import UserError

# Of a tensor [members, tokens, width]: 1 for each element that stays (uint8), seeds of such a mask, or nothing dropped.
Mask = torch.Tensor | MaskSeeds | None


def key_dropout(model: PeftModel, seed: int) -> "DropoutStep":
    """Replaces the dropout of every adapted layer. Returns the step that seeds it, which the trainer has to call."""
    step = DropoutStep(seed)
    for name, module in model.named_modules():
        for adapter, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[adapter] = KeyedDropout(dropout.p, name, step)
    return step


class DropoutStep(TrainerCallback):
    """What seeds the masks of a trainer's micro-batch: the run's seed, optimizer steps done, micro-batches since."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.optimizer_step, self.micro_batch = 0, 0
        self.on_gpu: tuple[torch.Tensor, torch.Tensor] | None = None
        self.key_of: tuple[int, int] | None = None  # the step and micro-batch whose key the GPU has

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.optimizer_step, self.micro_batch = state.global_step, 0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.micro_batch += 1

    def key(self, name: str) -> int:
        """Returns 63 bits for a layer of that name in this micro-batch."""
        return xxh3_64_intdigest(f"{self.seed}/{self.optimizer_step}/{self.micro_batch}/{name}".encode()) >> 1

    def keys(self, p: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns on a GPU the key [1] that all layers share in this micro-batch, and the rate [1].

        The key is copied to the GPU once a micro-batch. The tensors stay the same ones.
        """
        if self.on_gpu is None:
            self.on_gpu = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([p], device=device)
        now = self.optimizer_step, self.micro_batch
        if self.key_of != now:
            self.on_gpu[0].fill_(self.key(""))
            self.key_of = now
        return self.on_gpu


class KeyedDropout(nn.Module):
    """Dropout (arXiv:1207.0580) of rate `p` with a mask that depends on the layer's `name` and the step alone."""

    def __init__(self, p: float, name: str, step: DropoutStep) -> None:
        super().__init__()
        self.p, self.name, self.step = p, name, step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` [rows, length, width] with a share p of its elements zero, the others divided by 1 - p.

        In evaluation: `x` itself.
        """
        if not self.training:
            return x
        ones = torch.ones_like(x).view(1, -1, x.shape[-1])
        return x * apply_mask(ones, self.mask(x)).view_as(x) / (1 - self.p)

    def mask(self, x: torch.Tensor) -> Mask:
        """Returns this micro-batch's mask of `x` [rows, length, width], as of one member: [1, rows * length, width]."""
        if x.device.type == "cpu":
            return random_mask(self.step.key(self.name), self.p, x.shape).view(1, -1, x.shape[-1])
        return MaskSeeds(*self.step.keys(self.p, x.device), layer_number(self.name), x.shape[-2])


def random_mask(key: int, p: float, shape: Sequence[int]) -> torch.Tensor:
    """Returns 0 for a share p of the elements, 1 for the others (uint8, of that shape, on the CPU).

    p is exact to 1/65,536.
    """
    # PyTorch's generator takes three to four times as long (bernoulli_ of 589,824 elements in one thread).
    count = math.prod(shape)
    numbers = np.random.SFC64(key).random_raw(math.ceil(count / 4)).view(np.uint16)[:count]
    return torch.from_numpy((numbers >= round(p * 2**16)).view(np.uint8)).view(*shape)


def layer_number(name: str) -> int:
    """Returns 31 bits that tell layers apart."""
    return xxh3_64_intdigest(name.encode()) >> 33


def apply_mask(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Returns `x` [members, tokens, width] with zeros where the mask drops."""
    if mask is None:
        return x
    if isinstance(mask, torch.Tensor):
        return x * mask.to(x.dtype)  # masked_fill takes twice as long on a CPU
    from medtune.modeling.kernels.dropout import drop

    return drop(x, mask)


def dropout_matmul(x: torch.Tensor, a: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Returns the product [members, tokens, r] of masked `x` [members, tokens, width] and `a` [members, r, width]
    transposed."""
    if isinstance(mask, MaskSeeds):
        from medtune.modeling.kernels.dropout import MAX_RANK, MIN_TOKENS, multiply_dropped

        if a.shape[1] <= MAX_RANK and x.shape[0] * x.shape[1] >= MIN_TOKENS:
            return multiply_dropped(x, a, mask)
    return torch.bmm(apply_mask(x, mask), a.mT)


def dropout_matmul_backward(
    grad_low: torch.Tensor, x: torch.Tensor, a: torch.Tensor, mask: Mask
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of `x`, from that of `dropout_matmul`'s result, `grad_low` [members, tokens, r]; and masked
    `x`."""
    if isinstance(mask, MaskSeeds):
        from medtune.modeling.kernels.dropout import MAX_RANK, differentiate_dropped

        if a.shape[1] <= MAX_RANK:
            return differentiate_dropped(grad_low, x, a, mask)
    return apply_mask(torch.bmm(grad_low, a), mask), apply_mask(x, mask)


def require_kernel(device: torch.device) -> None:
    """Raises `UserError` on a GPU where Triton cannot build the kernel."""
    if device.type == "cuda" and not kernels.kernels_available():
        raise UserError(
            "lora.lora_dropout on a GPU needs Triton and a C compiler: pip install triton, apt-get install gcc "
            "python3-dev; or leave dropout out with lora.lora_dropout=0"
        )
