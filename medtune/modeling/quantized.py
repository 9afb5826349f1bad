"""The layers of the frozen base: what their packed weights stand for, views that share them, and proof of no change.

The only module that knows bitsandbytes' layers.
"""

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

log = logging.getLogger(__name__)


@dataclass
class FrozenLinear:
    """What a frozen layer computes.

    `forward`: its output [..., out] from its input [..., in]. `weight`: the numbers [out, in] it computes with,
    unpacked when asked for; None in 8 bits, where the outliers of the input have a product of their own.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    weight: Callable[[], torch.Tensor] | None
    bias: torch.Tensor | None


def frozen_linear(layer: torch.nn.Linear) -> FrozenLinear:
    """What a linear layer of the base computes, as it stands now."""
    weight: Callable[[], torch.Tensor] | None = None
    if isinstance(layer, Linear4bit):
        held = cached_weight(layer)
        weight = partial(dequantize, layer) if held is None else lambda: held
    elif not isinstance(layer, Linear8bitLt):
        weight = lambda: layer.weight  # noqa: E731
    return FrozenLinear(layer.forward, weight, layer.bias)


def supports_cuda_graphs(base: PreTrainedModel) -> bool:
    """Whether its products can be recorded as a CUDA graph: in 8 bits they ask the GPU how many outliers there are."""
    return not any(isinstance(module, Linear8bitLt) for module in base.modules())


def place_8bit_states(base: PreTrainedModel) -> None:
    """Do now what bitsandbytes does at the first forward pass: move an 8-bit weight's scales to their layer.

    Done later, by the first of several views that share the weight, it takes them from all others.
    """
    for module in base.modules():
        if isinstance(module, Linear8bitLt) and cast(Any, module.weight).CB is not None:
            module.init_8bit_state()


def keep_gradients_after_evaluation(base: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation.

    On a CPU with AVX512-BF16 one forward pass in eval mode repacks them for a kernel that has no backward: afterwards
    no gradient passes through the base, with a warning and a loss that still falls. A test trains across an evaluation.
    """
    for layer in four_bit_layers(base):
        layer.support_avx512bf16_for_cpu = False


def cache_dequantized(base: PreTrainedModel) -> None:
    """On a CPU, hold beside the 4-bit weights the numbers they stand for, and compute with those.

    Otherwise each pass unpacks all of them: a tenth of a training step, and for one token as much as its arithmetic.
    The numbers are the same to the bit. Where the memory is not there, and on a GPU, which has a kernel for it, nothing
    changes.
    """
    layers = four_bit_layers(base) if base.device.type == "cpu" else []
    needed = sum(layer.in_features * layer.out_features for layer in layers) * base.dtype.itemsize
    if needed > psutil.virtual_memory().available / 2:
        return
    for layer in layers:
        vars(layer)["forward"] = partial(F.linear, weight=dequantize(layer), bias=layer.bias)
    if layers:
        log.info("base: its 4-bit weights unpacked, once for all passes: %.2f GB more", needed / 1e9)


def cached_weight(layer: Linear4bit) -> torch.Tensor | None:
    """The numbers that a 4-bit layer computes with, where they are held."""
    forward = vars(layer).get("forward")
    return forward.keywords["weight"] if forward else None


def dequantize(layer: Linear4bit) -> torch.Tensor:
    """What the packed weight [out, in] of a 4-bit layer stands for."""
    packed: Any = layer.weight
    if packed.device.type == "cuda" and kernels.kernels_available():
        from medtune.modeling.kernels.dequantize import dequantize_4bit_weight as unpacked_at_once

        return unpacked_at_once(packed.data, packed.quant_state)
    return cast(torch.Tensor, dequantize_4bit(packed.data, packed.quant_state))


def four_bit_layers(base: PreTrainedModel) -> list[Linear4bit]:
    """The layers that bitsandbytes holds in 4 bits."""
    return [module for module in base.modules() if isinstance(module, Linear4bit)]
