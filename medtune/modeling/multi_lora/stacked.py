"""Adapters of several members as one: a layer's matrices are stacked, so that a pass has as many operations as that of
one member. On a GPU those are what a step of few tokens takes its time for, not the arithmetic."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from medtune.modeling.lora.dropout import KeyedDropout, Mask, MaskSeeds, layer_number, random_mask
from medtune.modeling.lora.linear import FusedLora, lora_linear, weights
from medtune.modeling.quantized import FrozenLinear

Layers = dict[str, Any]  # PEFT's layers, by their name in the base
Gradients = list[tuple[torch.nn.Parameter, torch.Tensor]]


def stackable(layer: Any) -> bool:
    """Whether a layer is plain LoRA; DoRA, say, needs the frozen weight."""
    return isinstance(layer, LoraLayer) and all(
        isinstance(layer.lora_variant.get(adapter), FusedLora) for adapter in layer.active_adapters
    )


class StackedAdapters:
    """Smaller ranks are filled up with zeros, and so is a layer that a member does not adapt."""

    def __init__(self, layers: Sequence[Layers]) -> None:
        self.layers = list(layers)
        self.passes = 0
        self.matrices: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.owned: list[list[tuple[torch.nn.Parameter, str, int]]] = [[] for _ in layers]
        self.slots: list[list[torch.Tensor]] = [[] for _ in layers]
        for name in dict.fromkeys(chain(*layers)):
            self.add(
                name, [weights(own[name], own[name].active_adapters[0]) if name in own else None for own in layers]
            )
        first = [next(iter(own.values())) for own in layers]  # a member's dropout and scale are those of all its layers
        found = [layer.lora_dropout[layer.active_adapters[0]] for layer in first]
        self.dropouts = [dropout if isinstance(dropout, KeyedDropout) else None for dropout in found]
        scales = [
            layer.scaling[layer.active_adapters[0]] / (1 - (dropout.p if dropout else 0.0))
            for layer, dropout in zip(first, self.dropouts, strict=True)
        ]
        self.device = next(iter(self.matrices.values()))[0].device
        self.scale = torch.tensor(scales, device=self.device)[:, None, None]
        self.shares = torch.tensor([dropout.p if dropout else 0.0 for dropout in self.dropouts], device=self.device)
        # Filled at each pass, where they are: a recorded pass reads them there.
        self.keys = torch.zeros(len(layers), dtype=torch.int64, device=self.device)
        # What masks are made from is the layer's name in a member that drops.
        self.names = {
            name: layer.lora_dropout[layer.active_adapters[0]].name
            for own, dropout in zip(layers, self.dropouts, strict=True)
            if dropout
            for name, layer in own.items()
        }

    def add(self, name: str, pairs: Sequence[tuple[torch.nn.Parameter, torch.nn.Parameter] | None]) -> None:
        """Make place for a layer's A and B of every member; None where a member does not adapt it."""
        known = [pair for pair in pairs if pair]
        rank, (a, b) = max(len(pair[0]) for pair in known), known[0]
        stacked = a.new_zeros(len(pairs), rank, a.shape[1]), b.new_zeros(len(pairs), b.shape[0], rank)
        for member, pair in enumerate(pairs):
            if pair:
                r = len(pair[0])
                self.owned[member] += [(pair[0], name, 0), (pair[1], name, 1)]
                self.slots[member] += [stacked[0][member, :r], stacked[1][member, :, :r]]
        self.matrices[name] = stacked[0].requires_grad_(), stacked[1].requires_grad_()

    def holds(self, layers: Sequence[Layers]) -> bool:
        """Whether it is of these members, in this order."""
        return len(layers) == len(self.layers) and all(a is b for a, b in zip(layers, self.layers, strict=True))

    @torch.no_grad()
    def load(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Take over the members' weights as they are, the shapes of their rows, and what their masks are made from."""
        self.shapes = shapes
        self.passes += 1
        for slots, owned in zip(self.slots, self.owned, strict=True):
            torch._foreach_copy_(slots, [parameter for parameter, _, _ in owned])
        if self.device.type == "cpu":
            return
        for member, dropout in enumerate(self.dropouts):
            if dropout:
                self.keys[member : member + 1].copy_(dropout.clock.keys(dropout.p, self.device)[0])

    def adapt(self, name: str, x: torch.Tensor, product: FrozenLinear) -> torch.Tensor:
        """See `Adapters`."""
        if name not in self.matrices:
            return product.forward(x)
        return lora_linear(product, x, *self.matrices[name], self.scale, self.mask(name, x))

    def mask(self, layer: str, x: torch.Tensor) -> Mask:
        """What all members' layers of that name keep of `x` [all rows, longest, in]."""
        if layer not in self.names:
            return None
        name, (_, longest, width) = self.names[layer], x.shape
        if x.device.type != "cpu":
            return MaskSeeds(self.keys, self.shares, layer_number(name), longest)
        masks = [
            F.pad(random_mask(dropout.clock.key(name), dropout.p, (rows, length, width)), (0, 0, 0, longest - length))
            if dropout
            else torch.ones(rows, longest, width, dtype=torch.uint8)
            for dropout, (rows, length) in zip(self.dropouts, self.shapes, strict=True)
        ]
        return torch.stack(masks).view(len(masks), -1, width)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The stacked matrices, A and B of each layer in turn."""
        return list(chain(*self.matrices.values()))

    def gradients(self, output: torch.Tensor, whole: torch.Tensor, wanted: Sequence[bool]) -> Gradients:
        """See `Adapters`."""
        return self.of_members(torch.autograd.grad(output, self.parameters, whole), wanted)

    def of_members(self, found: Sequence[torch.Tensor], wanted: Sequence[bool]) -> Gradients:
        """What the wanted members' parameters have of the gradients of `parameters`."""
        parts = iter(found)
        stacked = {name: (next(parts), next(parts)) for name in self.matrices}
        return [
            (parameter, own_part(stacked[name][which][member], parameter))
            for member, owned in enumerate(self.owned)
            if wanted[member]
            for parameter, name, which in owned
        ]


def own_part(stacked: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A matrix without the zeros that fill it up to the largest rank."""
    rows, columns = parameter.shape
    return stacked[:rows, :columns]
