"""bitsandbytes' layers of the frozen base model: what they compute, and the weights that they stand for."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import psutil
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import PreTrainedModel

from medtune.modeling import kernels
from medtune.modeling.forwards import replace_forward

log = logging.getLogger(__name__)


@dataclass
class FrozenLinear:
    """What a frozen layer computes.

    `forward`: its output [..., out] from its input [..., in]. `weight`: returns the weight [out, in], dequantized at
    the call; None in 8 bits, where the outliers of the input have a product of their own.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    weight: Callable[[], torch.Tensor] | None
    bias: torch.Tensor | None


def frozen_linear(layer: torch.nn.Linear) -> FrozenLinear:
    """Returns what a linear layer of the base model computes, as it is now."""
    weight: Callable[[], torch.Tensor] | None = None
    if isinstance(layer, Linear4bit):
        cached = cached_weight(layer)
        weight = partial(dequantize, layer) if cached is None else lambda: cached
    elif not isinstance(layer, Linear8bitLt):
        weight = lambda: layer.weight  # noqa: E731
    return FrozenLinear(layer.forward, weight, layer.bias)


def supports_cuda_graphs(base: PreTrainedModel) -> bool:
    """Returns whether CUDA graphs can capture its products: in 8 bits they ask the GPU how many outliers there are."""
    return not any(isinstance(module, Linear8bitLt) for module in base.modules())


def place_8bit_states(base: PreTrainedModel) -> None:
    """Moves the scales of 8-bit weights to their layers, as bitsandbytes does at the first forward pass.

    Done later, by the first of several views that share a weight, it takes them from all others.
    """
    for module in base.modules():
        if isinstance(module, Linear8bitLt) and cast(Any, module.weight).CB is not None:
            module.init_8bit_state()


def keep_gradients_after_evaluation(base: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights at the first evaluation.

    On a CPU with AVX512-BF16 one forward pass in eval mode repacks them for a kernel without a backward pass.
    Afterwards no gradient passes through the base model, with a warning only, and the loss still falls.
    """
    for layer in four_bit_layers(base):
        layer.support_avx512bf16_for_cpu = False


def cache_dequantized(base: PreTrainedModel) -> None:
    """Caches dequantized weights beside the 4-bit weights on a CPU, and makes layers compute with them.

    Otherwise each pass dequantizes all of them. The numbers are the same to the bit. Nothing changes where memory is
    short, or on a GPU, which has a kernel for it.
    """
    layers = four_bit_layers(base) if base.device.type == "cpu" else []
    needed = sum(layer.in_features * layer.out_features for layer in layers) * base.dtype.itemsize
    if needed > psutil.virtual_memory().available / 2:
        return
    for layer in layers:
        cached = partial(F.linear, weight=dequantize(layer), bias=layer.bias)
        replace_forward(layer, cached, "cached dequantized weight")
    if layers:
        log.info("base: dequantized weights cached (+%.2f GB)", needed / 1e9)


def cached_weight(layer: Linear4bit) -> torch.Tensor | None:
    """Returns the dequantized weight [out, in] of a 4-bit layer if it is cached."""
    forward = vars(layer).get("forward")
    return forward.keywords["weight"] if forward else None


def dequantize(layer: Linear4bit) -> torch.Tensor:
    """Returns the weight [out, in] that a 4-bit layer stands for."""
    packed: Any = layer.weight
    if packed.device.type == "cuda" and kernels.kernels_available():
        from medtune.modeling.kernels.dequantize import dequantize_4bit_weight

        return dequantize_4bit_weight(packed.data, packed.quant_state)
    return cast(torch.Tensor, dequantize_4bit(packed.data, packed.quant_state))


def four_bit_layers(base: PreTrainedModel) -> list[Linear4bit]:
    """Returns the layers that bitsandbytes holds in 4 bits."""
    return [module for module in base.modules() if isinstance(module, Linear4bit)]
