"""One pass through the frozen base for the rows of several members, each member's adapter acting on its own rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from medtune.modeling import cuda_graphs as graphs
from medtune.modeling.attention import CAUSAL
from medtune.modeling.forwards import replace_forward
from medtune.modeling.frozen_base import share_weights
from medtune.modeling.memory import CHECKPOINTING_KWARGS, free_memory
from medtune.modeling.multi_lora.captured import CapturedPasses
from medtune.modeling.multi_lora.sequential import SequentialAdapters
from medtune.modeling.multi_lora.stacked import Gradients, Layers, StackedAdapters, stackable
from medtune.modeling.quantized import FrozenLinear, frozen_linear, supports_cuda_graphs


@dataclass
class MicroBatch:
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
class ForwardPass:
    """A forward pass whose backward pass is still to come. `output`: hidden states [all rows, longest, width].

    `backward`: the members' gradients, from that at the output, of the members that want theirs.
    """

    rows: list[MicroBatch]
    output: torch.Tensor
    backward: Callable[[torch.Tensor, Sequence[bool]], Gradients]

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
        return self.backward(whole, [gradient is not None for gradient in wanted])


class Adapters(Protocol):
    """The adapters of the members in a pass."""

    def adapt(self, name: str, x: torch.Tensor, product: FrozenLinear) -> torch.Tensor:
        """The base's product of `x` [all rows, longest, in], with what each member's layer of that name adds."""

    def gradients(self, output: torch.Tensor, whole: torch.Tensor, wanted: Sequence[bool]) -> Gradients:
        """Of the parameters of the wanted members, from the gradient `whole` at the output."""


class Backbone:
    """The base without its head, with a place for members' adapters at every linear layer."""

    def __init__(self, base: PreTrainedModel, checkpointing: bool, attention: str, longest: int) -> None:
        self.longest = longest  # of the rows that may come, in tokens
        tree = share_weights(base).train()
        tree.config._attn_implementation = attention
        if checkpointing:
            tree.gradient_checkpointing_enable(CHECKPOINTING_KWARGS)
        self.trunk = tree.base_model
        self.adapters: Adapters | None = None  # of whoever's rows went through the base last
        self.records = attention == CAUSAL and supports_cuda_graphs(base)
        self.recordings: CapturedPasses | None = None  # of the adapters that are stacked
        self.refused: Adapters | None = None  # those whose passes were not to be recorded
        for name, module in self.trunk.named_modules():
            if isinstance(module, torch.nn.Linear):  # bitsandbytes' layers are too
                adapted = partial(self.adapted, name, frozen_linear(module))
                replace_forward(module, adapted, "adapters of all members")

    def adapted(self, name: str, product: FrozenLinear, x: torch.Tensor) -> torch.Tensor:
        """A linear layer of the base over all rows, and each member's adapter of it over its own."""
        assert self.adapters is not None
        return self.adapters.adapt(name, x, product)

    def through(self, rows: list[MicroBatch]) -> ForwardPass:
        """Runs members' rows through the base model; shorter ones are padded on the right."""
        longest = max(row.shape[1] for row in rows)
        ids = pad_and_cat([row.input_ids for row in rows], longest)
        mask = pad_and_cat([row.attention_mask for row in rows], longest)
        adapters, arithmetic = self.adapters_of(rows), rows[0].arithmetic
        if isinstance(adapters, StackedAdapters) and self.may_capture(adapters):
            passed = graphs.try_capture("passes", lambda: self.recorded(rows, ids, adapters, arithmetic))
            if passed:
                return passed
            self.recordings, self.refused = None, adapters
            self.records = not graphs.CAPTURE_THREAD.failed
            free_memory()
        hidden = self.hidden(ids, mask, arithmetic)
        return ForwardPass(rows, hidden, lambda gradient, wanted: adapters.gradients(hidden, gradient, wanted))

    def may_capture(self, adapters: StackedAdapters) -> bool:
        """Whether capturing passes of these adapters pays.

        Where groups of members take turns, each pass has another stack: capturing takes longer than it saves.
        """
        return self.records and adapters.passes > 1 and adapters is not self.refused

    def recorded(
        self, rows: list[MicroBatch], ids: torch.Tensor, adapters: StackedAdapters, arithmetic: tuple[bool, torch.dtype]
    ) -> ForwardPass:
        """The same, recorded. Raises what `graphs.captured` raises."""
        if self.recordings is None:
            free_memory()  # what passes before took would stay beside the memory that the recordings take
            run = partial(self.hidden, attention_mask=None, arithmetic=arithmetic)
            self.recordings = CapturedPasses(run, adapters.parameters, ids.device, self.longest)
        recordings = self.recordings
        return ForwardPass(rows, recordings.forward(ids), lambda g, w: adapters.of_members(recordings.backward(g), w))

    def hidden(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, arithmetic: tuple[bool, torch.dtype]
    ) -> torch.Tensor:
        """Hidden states [rows, length, width] of token ids [rows, length]."""
        autocast, dtype = arithmetic
        with torch.enable_grad(), torch.autocast(ids.device.type, dtype, autocast, cache_enabled=False):
            return self.trunk(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def adapters_of(self, rows: list[MicroBatch]) -> "Adapters":
        """The members' adapters stacked, where they can be, else one after another."""
        layers = [row.layers for row in rows]
        alike = len({row.shape[0] for row in rows}) == 1
        if not (alike and isinstance(self.adapters, StackedAdapters) and self.adapters.holds(layers)):
            self.forget()  # before the memory of others is asked for
            plain = all(map(stackable, chain(*(own.values() for own in layers))))
            self.adapters = (
                StackedAdapters(layers) if alike and plain else SequentialAdapters(layers, [row.shape for row in rows])
            )
        if isinstance(self.adapters, StackedAdapters):
            self.adapters.load([row.shape for row in rows])
        return self.adapters

    def forget(self) -> None:
        """Let go of the adapters of members that may have ended."""
        self.adapters = self.recordings = self.refused = None


def pad_and_cat(parts: list[torch.Tensor], longest: int) -> torch.Tensor:
    """Returns members' tensors [rows, length] as one [all rows, longest], padded with zeros on the right."""
    return torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])


def proxy_base(base: PreTrainedModel, through: Callable[[MicroBatch], torch.Tensor]) -> PreTrainedModel:
    """A view of the base that gets the hidden states of its rows in training from `through`; attach an adapter to it
    and train it as usual. Its own backward pass ends there."""
    net = share_weights(base)
    trunk, layers = net.base_model, Layers()
    stock = trunk.forward

    def proxy_forward(
        input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> Any:
        if not torch.is_grad_enabled() or input_ids is None or attention_mask is None:
            return stock(input_ids=input_ids, attention_mask=attention_mask, **others)  # an evaluation
        device = input_ids.device.type
        arithmetic = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        if not layers:
            layers.update(layers_of(trunk))
        return BaseModelOutputWithPast(through(MicroBatch(input_ids, attention_mask, arithmetic, layers)))

    replace_forward(trunk, proxy_forward, "hidden states from the shared pass")
    return net


def layers_of(trunk: torch.nn.Module) -> Layers:
    """The adapted layers by their name in the base."""
    return {name: module for name, module in trunk.named_modules() if isinstance(module, BaseTunerLayer)}


def accumulate(found: Gradients) -> None:
    """Add gradients to those of the micro-batches before; to all of them, or to none when memory is short."""
    fresh = [(parameter, gradient) for parameter, gradient in found if parameter.grad is None]
    sums = [(parameter.grad, gradient) for parameter, gradient in found if parameter.grad is not None]
    if fresh:  # memory of their own: a part of a stack would keep that of all members
        copies = torch._foreach_mul([gradient for _, gradient in fresh], 1.0)
        for (parameter, _), copy in zip(fresh, copies, strict=True):
            parameter.grad = copy
    if sums:
        torch._foreach_add_(*map(list, zip(*sums, strict=True)))
