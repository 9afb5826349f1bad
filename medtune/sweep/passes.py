"""One pass through the frozen base for the rows of several members, each member's adapter acting on its own rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from medtune.dropout import KeyedDropout, Keys, Mask, drawn, layer_number
from medtune.low_rank import LowRank, updated, weights
from medtune.model import view

Layers = dict[str, Any]  # PEFT's layers, by their name in the base
Gradients = list[tuple[torch.nn.Parameter, torch.Tensor]]


@dataclass
class Rows:
    """A micro-batch: token ids and mask [rows, length], and the arithmetic (autocast on, its type) it is wanted in.

    `layers`: the adapter of the member that it belongs to.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    arithmetic: tuple[bool, torch.dtype]
    layers: Layers

    @property
    def shape(self) -> tuple[int, int]:
        """How many, and how long."""
        return self.input_ids.shape[0], self.input_ids.shape[1]


@dataclass
class Pass:
    """A forward pass whose backward pass is still to come. `output`: hidden states [all rows, longest, width]."""

    rows: list[Rows]
    adapters: "Adapters"
    output: torch.Tensor

    def split(self, whole: torch.Tensor) -> Iterator[torch.Tensor]:
        """Each member's own part of a tensor of the output's shape, without the padding of the pack."""
        parts = whole.split([row.shape[0] for row in self.rows])
        return (part[:, : row.shape[1]] for row, part in zip(self.rows, parts, strict=True))

    def gradients(self, wanted: Sequence[torch.Tensor | None]) -> Gradients:
        """The gradient of every parameter of some members, from those at their hidden states; None: not this one."""
        whole = torch.zeros_like(self.output)
        for part, gradient in zip(self.split(whole), wanted, strict=True):
            if gradient is not None:
                part.copy_(gradient)
        return self.adapters.gradients(self.output, whole, [gradient is not None for gradient in wanted])


class Adapters(Protocol):
    """The adapters of the members in a pass."""

    def adapt(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The base's product `y` of `x`, both [all rows, longest, width], with what each member's layer adds."""

    def gradients(self, output: torch.Tensor, whole: torch.Tensor, wanted: Sequence[bool]) -> Gradients:
        """Of the parameters of the wanted members, from the gradient `whole` at the output."""


class Trunk:
    """The base without its head, with a place for members' adapters at every linear layer."""

    def __init__(self, base: PreTrainedModel, checkpointing: bool, attention: str) -> None:
        tree = view(base).train()
        tree.config._attn_implementation = attention
        if checkpointing:
            # Dropout has its own keys: nothing random happens that a recomputation would have to repeat.
            tree.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self.trunk = tree.base_model
        self.adapters: Adapters  # of whoever's rows are in the base right now
        self.stack: Stack | None = None
        for name, module in self.trunk.named_modules():
            if isinstance(module, torch.nn.Linear):  # bitsandbytes' layers are too
                vars(module)["forward"] = partial(self.adapted, name, module.forward)

    def adapted(self, name: str, frozen: Any, x: torch.Tensor) -> torch.Tensor:
        """A linear layer of the base over all rows, and each member's adapter of it over its own."""
        return self.adapters.adapt(name, x, frozen(x))

    def through(self, rows: list[Rows]) -> Pass:
        """Run members' rows through the base, shorter ones padded on the right."""
        longest = max(row.shape[1] for row in rows)
        ids, mask = (
            torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])
            for parts in ([row.input_ids for row in rows], [row.attention_mask for row in rows])
        )
        self.adapters = self.adapters_of(rows)
        autocast, dtype = rows[0].arithmetic
        with torch.enable_grad(), torch.autocast(ids.device.type, dtype=dtype, enabled=autocast):
            hidden = self.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return Pass(rows, self.adapters, hidden)

    def adapters_of(self, rows: list[Rows]) -> Adapters:
        """Stacked where they can be, else one after another."""
        layers = [row.layers for row in rows]
        if len({row.shape[0] for row in rows}) > 1 or not all(map(stackable, chain(*(ls.values() for ls in layers)))):
            self.stack = None
            return Apart(rows)
        if self.stack is None or not self.stack.holds(layers):
            self.stack = None  # before the memory is asked for
            self.stack = Stack(layers)
        self.stack.load(rows)
        return self.stack


def stackable(layer: Any) -> bool:
    """Whether a layer is plain LoRA; DoRA, say, needs the frozen weight."""
    return isinstance(layer, LoraLayer) and all(
        isinstance(layer.lora_variant.get(adapter), LowRank) for adapter in layer.active_adapters
    )


class Stack:
    """Adapters of several members as one: a layer's matrices are stacked, so that a pass has as many operations as that
    of one member. Smaller ranks are filled up with zeros, and so is a layer that a member does not adapt."""

    def __init__(self, layers: Sequence[Layers]) -> None:
        self.layers = list(layers)
        self.matrices: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.owned: list[list[tuple[torch.nn.Parameter, str, int]]] = [[] for _ in layers]
        self.slots: list[list[torch.Tensor]] = [[] for _ in layers]
        for name in dict.fromkeys(chain(*layers)):
            pairs = [weights(own[name], own[name].active_adapters[0]) if name in own else None for own in layers]
            known = [pair for pair in pairs if pair]
            rank, (a, b) = max(len(pair[0]) for pair in known), known[0]
            stacked = (
                a.new_zeros(len(layers), rank, a.shape[1]).requires_grad_(),
                b.new_zeros(len(layers), b.shape[0], rank).requires_grad_(),
            )
            self.matrices[name] = stacked
            for member, pair in enumerate(pairs):
                if pair:
                    r = len(pair[0])
                    self.owned[member] += [(pair[0], name, 0), (pair[1], name, 1)]
                    self.slots[member] += [stacked[0].detach()[member, :r], stacked[1].detach()[member, :, :r]]
        first = [next(iter(own.values())) for own in layers]
        self.dropouts: list[Any] = [layer.lora_dropout[layer.active_adapters[0]] for layer in first]
        scales = [
            layer.scaling[layer.active_adapters[0]] / (1 - getattr(dropout, "p", 0.0))
            for layer, dropout in zip(first, self.dropouts, strict=True)
        ]
        self.scale = torch.tensor(scales, device=a.device)[:, None, None]
        self.names = {name: dropout_name(own[name]) for own in layers for name in own}

    def holds(self, layers: Sequence[Layers]) -> bool:
        """Whether it is of these members, in this order."""
        return len(layers) == len(self.layers) and all(a is b for a, b in zip(layers, self.layers, strict=True))

    def load(self, rows: Sequence[Rows]) -> None:
        """Take over the members' weights as they are now, and what their masks are made from."""
        self.shapes = [row.shape for row in rows]
        for slots, owned in zip(self.slots, self.owned, strict=True):
            torch._foreach_copy_(slots, [parameter.detach() for parameter, _, _ in owned])
        device = self.scale.device
        self.drops = any(isinstance(dropout, KeyedDropout) for dropout in self.dropouts)
        if self.drops and device.type != "cpu":
            none = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
            found = [d.clock.keys(device) if isinstance(d, KeyedDropout) else none for d in self.dropouts]
            self.keys, self.shares = (torch.cat(parts) for parts in zip(*found, strict=True))

    def adapt(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `Adapters`."""
        if name not in self.matrices:
            return y
        return updated(y, x, *self.matrices[name], self.scale, self.mask(self.names[name], x))

    def mask(self, name: str, x: torch.Tensor) -> Mask:
        """What all members' layers of that name keep of `x` [all rows, longest, in]."""
        if not self.drops:
            return None
        longest, width = x.shape[1:]
        if x.device.type != "cpu":
            return Keys(self.keys, self.shares, layer_number(name), longest)
        masks = [
            F.pad(drawn(d.clock.key(name), d.p, (*shape, width)), (0, 0, 0, longest - shape[1]))
            if isinstance(d, KeyedDropout)
            else torch.ones(shape[0], longest, width, dtype=torch.uint8)
            for d, shape in zip(self.dropouts, self.shapes, strict=True)
        ]
        return torch.stack(masks).view(len(masks), -1, width)

    def gradients(self, output: torch.Tensor, whole: torch.Tensor, wanted: Sequence[bool]) -> Gradients:
        """See `Adapters`."""
        leaves = list(chain(*self.matrices.values()))
        found = iter(torch.autograd.grad(output, leaves, whole))
        stacked = {name: (next(found), next(found)) for name in self.matrices}
        return [
            (parameter, own_part(stacked[name][which][member], parameter))
            for member, owned in enumerate(self.owned)
            if wanted[member]
            for parameter, name, which in owned
        ]


def dropout_name(layer: Any) -> str:
    """What the masks of a layer are made from, beside the clock; empty where nothing is dropped."""
    return getattr(layer.lora_dropout[layer.active_adapters[0]], "name", "")


def own_part(stacked: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A matrix without the zeros that fill it up to the largest rank."""
    rows, columns = parameter.shape
    return stacked[:rows, :columns].contiguous()


@dataclass
class Apart:
    """Adapters of any kind, one after another."""

    rows: list[Rows]
    parameters: list[list[torch.nn.Parameter]] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [
            [p for layer in row.layers.values() for p in layer.parameters() if p.requires_grad] for row in self.rows
        ]

    def adapt(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `Adapters`."""
        if not any(name in row.layers for row in self.rows):
            return y
        counts = [row.shape[0] for row in self.rows]
        parts = zip(self.rows, x.split(counts), y.split(counts), strict=True)
        return torch.cat([adapt(row, row.layers.get(name), own_x, own_y) for row, own_x, own_y in parts])

    def gradients(self, output: torch.Tensor, whole: torch.Tensor, wanted: Sequence[bool]) -> Gradients:
        """See `Adapters`."""
        asked = list(chain(*(own for own, is_wanted in zip(self.parameters, wanted, strict=True) if is_wanted)))
        return list(zip(asked, torch.autograd.grad(output, asked, whole), strict=True))


def adapt(row: Rows, layer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """PEFT's own layer on a member's rows, with the frozen product `y` at hand; padding of the pack stays outside."""
    if layer is None:
        return y
    padding = x.shape[1] - row.shape[1]
    if padding:
        x, y = x[:, :-padding], y[:, :-padding]
    base = vars(layer.get_base_layer())
    base["forward"] = lambda *_: y
    try:
        adapted = layer(x)
    finally:
        del base["forward"]
    return F.pad(adapted, (0, 0, 0, padding)) if padding else adapted


def layers_of(trunk: torch.nn.Module) -> Layers:
    """The adapted layers by their name in the base."""
    return {name: module for name, module in trunk.named_modules() if isinstance(module, BaseTunerLayer)}
