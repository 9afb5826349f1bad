"""Adapters of several members, of any kind, one after another: what cannot be stacked, or has other numbers of rows."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from medtune.modeling.forwards import forward_replaced
from medtune.modeling.lora.linear import FusedLora
from medtune.modeling.multi_lora.stacked import Gradients, Layers, stackable
from medtune.modeling.quantized import FrozenLinear


class SequentialAdapters:
    """Of the members of one pass, whose rows have these `shapes`."""

    def __init__(self, layers: Sequence[Layers], shapes: Sequence[tuple[int, int]]) -> None:
        self.layers, self.shapes = layers, shapes
        self.parameters = [
            [p for layer in own.values() for p in layer.parameters() if p.requires_grad] for own in layers
        ]

    def adapt(self, name: str, x: torch.Tensor, product: FrozenLinear) -> torch.Tensor:
        """See `Adapters`."""
        y = product.forward(x)
        if not any(name in own for own in self.layers):
            return y
        counts = [count for count, _ in self.shapes]
        members = zip(self.layers, self.shapes, x.split(counts), y.split(counts), strict=True)
        return torch.cat([adapt(own.get(name), length, own_x, own_y) for own, (_, length), own_x, own_y in members])

    def gradients(self, output: torch.Tensor, whole: torch.Tensor, wanted: Sequence[bool]) -> Gradients:
        """See `Adapters`."""
        asked = list(chain(*(own for own, is_wanted in zip(self.parameters, wanted, strict=True) if is_wanted)))
        return list(zip(asked, torch.autograd.grad(output, asked, whole), strict=True))


def adapt(layer: Any, length: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A member's layer on its rows of that length, with the frozen product `y` at hand; padding of the pack stays
    outside."""
    if layer is None:
        return y
    padding = x.shape[1] - length
    if padding:
        x, y = x[:, :-padding], y[:, :-padding]
    adapted = (
        FusedLora.forward(layer, layer.active_adapters[0], x, y) if stackable(layer) else with_product(layer, x, y)
    )
    return F.pad(adapted, (0, 0, 0, padding)) if padding else adapted


def with_product(layer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns what PEFT's own layer makes of `x`, with `y` for the output of its base layer."""
    with forward_replaced(layer.get_base_layer(), lambda *_: y, "known product"):
        return layer(x)
