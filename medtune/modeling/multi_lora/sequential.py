"""Adapters of several members, of any kind, one after another: for those that cannot be stacked."""

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
    """The adapters of the members in one pass. `shapes`: rows and length of each member's micro-batch."""

    def __init__(self, layers: Sequence[Layers], shapes: Sequence[tuple[int, int]]) -> None:
        self.layers, self.shapes = layers, shapes
        self.parameters = [trained_parameters(own) for own in layers]

    def adapt(self, name: str, x: torch.Tensor, product: FrozenLinear) -> torch.Tensor:
        """See `Adapters`."""
        y = product.forward(x)
        if not any(name in own for own in self.layers):
            return y
        counts = [count for count, _ in self.shapes]
        members = zip(self.layers, self.shapes, x.split(counts), y.split(counts), strict=True)
        return torch.cat([adapt(own.get(name), length, own_x, own_y) for own, (_, length), own_x, own_y in members])

    def gradients(self, output: torch.Tensor, grad_output: torch.Tensor, wanted: Sequence[bool]) -> Gradients:
        """See `Adapters`."""
        chosen = [own for own, is_wanted in zip(self.parameters, wanted, strict=True) if is_wanted]
        parameters = list(chain(*chosen))
        return list(zip(parameters, torch.autograd.grad(output, parameters, grad_output), strict=True))


def trained_parameters(layers: Layers) -> list[torch.nn.Parameter]:
    """Returns the parameters of a member's layers that train."""
    return [parameter for layer in layers.values() for parameter in layer.parameters() if parameter.requires_grad]


def adapt(layer: Any, length: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns what a member's layer makes of its rows `x`, given their frozen product `y`.

    Both are padded beyond the member's own `length`; the layer never sees that padding. No layer: `y`.
    """
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
