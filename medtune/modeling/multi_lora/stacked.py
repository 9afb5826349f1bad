"""Adapters of several members as one: a layer's matrices are stacked, and a pass has the operations of one member.

On a GPU a step of few tokens takes its time for launching operations, not for arithmetic.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from medtune.modeling.kernels import MaskSeeds
from medtune.modeling.lora.dropout import KeyedDropout, Mask, layer_number, random_mask
from medtune.modeling.lora.linear import FusedLora, lora_linear, weights
from medtune.modeling.quantized import FrozenLinear

Layers = dict[str, Any]  # PEFT's layers, by their name in the base
Gradients = list[tuple[torch.nn.Parameter, torch.Tensor]]
Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]  # A [r, in] and B [out, r]


def stackable(layer: Any) -> bool:
    """Returns whether a layer is plain LoRA. DoRA, for example, needs the frozen weight."""
    return isinstance(layer, LoraLayer) and all(
        isinstance(layer.lora_variant.get(adapter), FusedLora) for adapter in layer.active_adapters
    )


class StackedAdapters:
    """The stacked adapters of the members in a pass.

    Zeros fill smaller ranks, and stand for a layer that a member does not adapt.
    """

    def __init__(self, layers: Sequence[Layers]) -> None:
        self.layers = list(layers)
        self.passes = 0  # that these adapters had
        self.matrices: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # A [members, r, in], B [members, out, r]
        # Of each member: parameter, name of its layer, 0 for A and 1 for B; and its part of the stacked matrix.
        self.owned: list[list[tuple[torch.nn.Parameter, str, int]]] = [[] for _ in layers]
        self.slots: list[list[torch.Tensor]] = [[] for _ in layers]
        for name in dict.fromkeys(chain(*layers)):
            self.stack(name, [active_weights(own.get(name)) for own in layers])
        self.device = next(iter(self.matrices.values()))[0].device
        self.read_dropout()

    def stack(self, name: str, pairs: Sequence[Pair | None]) -> None:
        """Makes room for a layer's A and B of every member; None where a member does not adapt it."""
        known = [pair for pair in pairs if pair]
        rank, (a, b) = max(len(pair[0]) for pair in known), known[0]
        stacked = a.new_zeros(len(pairs), rank, a.shape[1]), b.new_zeros(len(pairs), b.shape[0], rank)
        for member, pair in enumerate(pairs):
            if pair:
                r = len(pair[0])
                self.owned[member] += [(pair[0], name, 0), (pair[1], name, 1)]
                self.slots[member] += [stacked[0][member, :r], stacked[1][member, :, :r]]
        self.matrices[name] = stacked[0].requires_grad_(), stacked[1].requires_grad_()

    def read_dropout(self) -> None:
        """Reads dropout and scale of every member; they are the same in all of its layers."""
        first = [next(iter(own.values())) for own in self.layers]
        modules = [layer.lora_dropout[layer.active_adapters[0]] for layer in first]
        self.dropouts = [module if isinstance(module, KeyedDropout) else None for module in modules]
        rates = [dropout.p if dropout else 0.0 for dropout in self.dropouts]
        scales = [
            layer.scaling[layer.active_adapters[0]] / (1 - rate) for layer, rate in zip(first, rates, strict=True)
        ]
        self.scale = torch.tensor(scales, device=self.device)[:, None, None]
        self.rates = torch.tensor(rates, device=self.device)
        # Filled in place at each pass: a captured pass reads them at this address.
        self.keys = torch.zeros(len(self.layers), dtype=torch.int64, device=self.device)
        self.dropout_names: dict[str, str] = {}  # what masks are seeded with, by a layer's name in the base
        for own, dropout in zip(self.layers, self.dropouts, strict=True):
            if dropout:
                for name, layer in own.items():
                    self.dropout_names[name] = layer.lora_dropout[layer.active_adapters[0]].name

    def are_of(self, layers: Sequence[Layers]) -> bool:
        """Returns whether the stack is of these members, in this order."""
        return len(layers) == len(self.layers) and all(a is b for a, b in zip(layers, self.layers, strict=True))

    @torch.no_grad()
    def load(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Copies the members' present weights and dropout keys. `shapes`: rows and length of each micro-batch."""
        self.shapes = shapes
        self.passes += 1
        for slots, owned in zip(self.slots, self.owned, strict=True):
            torch._foreach_copy_(slots, [parameter for parameter, _, _ in owned])
        if self.device.type == "cpu":
            return
        for member, dropout in enumerate(self.dropouts):
            if dropout:
                self.keys[member : member + 1].copy_(dropout.step.keys(dropout.p, self.device)[0])

    def adapt(self, name: str, x: torch.Tensor, product: FrozenLinear) -> torch.Tensor:
        """See `Adapters`."""
        if name not in self.matrices:
            return product.forward(x)
        return lora_linear(product, x, *self.matrices[name], self.scale, self.mask(name, x))

    def mask(self, layer: str, x: torch.Tensor) -> Mask:
        """Returns the dropout masks of all members' layers of that name, for `x` [all rows, longest, in]."""
        if layer not in self.dropout_names:
            return None
        name, (_, longest, width) = self.dropout_names[layer], x.shape
        if x.device.type != "cpu":
            return MaskSeeds(self.keys, self.rates, layer_number(name), longest)
        masks = []
        for dropout, (rows, length) in zip(self.dropouts, self.shapes, strict=True):
            if dropout is None:
                masks.append(torch.ones(rows, longest, width, dtype=torch.uint8))
                continue
            mask = random_mask(dropout.step.key(name), dropout.p, (rows, length, width))
            masks.append(F.pad(mask, (0, 0, 0, longest - length)))
        return torch.stack(masks).view(len(masks), -1, width)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The stacked matrices, A and B of each layer in turn."""
        return list(chain(*self.matrices.values()))

    def gradients(self, output: torch.Tensor, grad_output: torch.Tensor, wanted: Sequence[bool]) -> Gradients:
        """See `Adapters`."""
        return self.split_gradients(torch.autograd.grad(output, self.parameters, grad_output), wanted)

    def split_gradients(self, gradients: Sequence[torch.Tensor], wanted: Sequence[bool]) -> Gradients:
        """Returns the gradients of the wanted members' own parameters, from those of `parameters`."""
        parts = iter(gradients)
        stacked = {name: (next(parts), next(parts)) for name in self.matrices}
        return [
            (parameter, unpad(stacked[name][which][member], parameter))
            for member, owned in enumerate(self.owned)
            if wanted[member]
            for parameter, name, which in owned
        ]


def active_weights(layer: Any) -> Pair | None:
    """Returns A and B of a layer's active adapter; None if there is no layer."""
    return None if layer is None else weights(layer, layer.active_adapters[0])


def unpad(stacked: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Returns a member's part of a stacked matrix, without the zeros that fill it up to the largest rank."""
    rows, columns = parameter.shape
    return stacked[:rows, :columns]
