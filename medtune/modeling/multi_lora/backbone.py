"""One pass through the frozen base for the rows of several members; each member's adapter acts on its own rows."""

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

Autocast = tuple[bool, torch.dtype]  # whether it is on, and its type


@dataclass
class MicroBatch:
    """A member's micro-batch: token ids and attention mask [rows, length], the autocast that it was given in, and the
    member's adapted layers."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    autocast: Autocast
    layers: Layers

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows, and their length in tokens."""
        return self.input_ids.shape[0], self.input_ids.shape[1]


@dataclass
class ForwardPass:
    """A forward pass whose backward pass is still to come. `output`: hidden states [all rows, longest, width].

    `backward`: returns members' gradients, from the gradient of the output and which members want theirs.
    """

    batches: list[MicroBatch]
    output: torch.Tensor
    backward: Callable[[torch.Tensor, Sequence[bool]], Gradients]

    def split(self, whole: torch.Tensor) -> Iterator[torch.Tensor]:
        """Returns each member's part of a tensor of the output's shape, without the padding to the longest rows."""
        parts = whole.split([batch.shape[0] for batch in self.batches])
        return (part[:, : batch.shape[1]] for batch, part in zip(self.batches, parts, strict=True))

    def gradients(self, grad_hidden: Sequence[torch.Tensor | None]) -> Gradients:
        """Returns the gradients of members' parameters, from those of their hidden states; None: not of this one."""
        grad_output = torch.zeros_like(self.output)
        for part, gradient in zip(self.split(grad_output), grad_hidden, strict=True):
            if gradient is not None:
                part.copy_(gradient)
        return self.backward(grad_output, [gradient is not None for gradient in grad_hidden])


class Adapters(Protocol):
    """The adapters of the members in a pass."""

    def adapt(self, name: str, x: torch.Tensor, product: FrozenLinear) -> torch.Tensor:
        """Returns the base's product of `x` [all rows, longest, in], with what each member's layer of that name adds.

        The product: [all rows, longest, out].
        """

    def gradients(self, output: torch.Tensor, grad_output: torch.Tensor, wanted: Sequence[bool]) -> Gradients:
        """Returns the gradients of the wanted members' parameters."""


class Backbone:
    """The base model without its head; members' adapters act at each of its linear layers.

    `longest`: the most tokens that a row may have.
    """

    def __init__(self, base: PreTrainedModel, checkpointing: bool, attention: str, longest: int) -> None:
        self.longest = longest
        view = share_weights(base).train()
        view.config._attn_implementation = attention
        if checkpointing:
            view.gradient_checkpointing_enable(CHECKPOINTING_KWARGS)
        self.model = view.base_model
        self.adapters: Adapters | None = None  # of the latest pass
        self.can_capture = attention == CAUSAL and supports_cuda_graphs(base)
        self.captured: CapturedPasses | None = None  # of the adapters that are stacked now
        self.not_captured: Adapters | None = None  # the adapters whose passes could not be captured
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear):  # bitsandbytes' layers are too
                adapted = partial(self.adapt, name, frozen_linear(module))
                replace_forward(module, adapted, "adapters of all members")

    def adapt(self, name: str, product: FrozenLinear, x: torch.Tensor) -> torch.Tensor:
        """Returns a linear layer's output for all rows, with what each member's adapter adds to its own."""
        assert self.adapters is not None
        return self.adapters.adapt(name, x, product)

    def forward(self, batches: list[MicroBatch]) -> ForwardPass:
        """Runs members' rows through the base model; shorter ones are padded on the right."""
        longest = max(batch.shape[1] for batch in batches)
        ids = pad_and_cat([batch.input_ids for batch in batches], longest)
        mask = pad_and_cat([batch.attention_mask for batch in batches], longest)
        adapters, autocast = self.adapters_of(batches), batches[0].autocast
        if isinstance(adapters, StackedAdapters) and self.may_capture(adapters):
            passed = graphs.try_capture("passes", lambda: self.forward_captured(batches, ids, adapters))
            if passed:
                return passed
            self.captured, self.not_captured = None, adapters
            self.can_capture = not graphs.CAPTURE_THREAD.failed
            free_memory()
        hidden = self.hidden_states(ids, mask, autocast)
        return ForwardPass(batches, hidden, partial(adapters.gradients, hidden))

    def may_capture(self, adapters: StackedAdapters) -> bool:
        """Returns whether capturing passes of these adapters pays.

        Where groups of members take turns, each pass has another stack: capturing takes longer than it saves.
        """
        return self.can_capture and adapters.passes > 1 and adapters is not self.not_captured

    def forward_captured(self, batches: list[MicroBatch], ids: torch.Tensor, adapters: StackedAdapters) -> ForwardPass:
        """Replays the pass, captured first where its shape is new. Raises what `cuda_graphs.capture` raises."""
        if self.captured is None:
            free_memory()  # what earlier passes took would stay beside the memory of the captured ones
            run = partial(self.hidden_states, attention_mask=None, autocast=batches[0].autocast)
            self.captured = CapturedPasses(run, adapters.parameters, ids.device, self.longest)
        captured = self.captured

        def backward(grad_output: torch.Tensor, wanted: Sequence[bool]) -> Gradients:
            return adapters.split_gradients(captured.backward(grad_output), wanted)

        return ForwardPass(batches, captured.forward(ids), backward)

    def hidden_states(self, ids: torch.Tensor, attention_mask: torch.Tensor | None, autocast: Autocast) -> torch.Tensor:
        """Returns hidden states [rows, length, width] of token ids [rows, length]."""
        enabled, dtype = autocast
        with torch.enable_grad(), torch.autocast(ids.device.type, dtype, enabled, cache_enabled=False):
            return self.model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def adapters_of(self, batches: list[MicroBatch]) -> Adapters:
        """Returns the members' adapters: stacked, where that is possible, else one after another."""
        layers = [batch.layers for batch in batches]
        shapes = [batch.shape for batch in batches]
        alike = len({rows for rows, _ in shapes}) == 1
        if not (alike and isinstance(self.adapters, StackedAdapters) and self.adapters.are_of(layers)):
            self.release()  # before other adapters need memory
            plain = all(map(stackable, chain(*(own.values() for own in layers))))
            self.adapters = StackedAdapters(layers) if alike and plain else SequentialAdapters(layers, shapes)
        if isinstance(self.adapters, StackedAdapters):
            self.adapters.load(shapes)
        return self.adapters

    def release(self) -> None:
        """Drops the adapters of members that may have ended, and their captured passes."""
        self.adapters = self.captured = self.not_captured = None


def pad_and_cat(parts: list[torch.Tensor], longest: int) -> torch.Tensor:
    """Returns members' tensors [rows, length] as one [all rows, longest], padded with zeros on the right."""
    return torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])


def proxy_base(base: PreTrainedModel, forward: Callable[[MicroBatch], torch.Tensor]) -> PreTrainedModel:
    """Returns a view of the base model for one member: in training, its hidden states come from `forward`.

    Attach an adapter to it and train as usual. The member's own backward pass ends at those hidden states.
    """
    view = share_weights(base)
    model, layers = view.base_model, Layers()
    stock = model.forward

    def proxy_forward(
        input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> Any:
        evaluating = not torch.is_grad_enabled()
        if evaluating or input_ids is None or attention_mask is None:
            return stock(input_ids=input_ids, attention_mask=attention_mask, **others)
        device = input_ids.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        if not layers:
            layers.update(layers_of(model))
        return BaseModelOutputWithPast(forward(MicroBatch(input_ids, attention_mask, autocast, layers)))

    replace_forward(model, proxy_forward, "hidden states from the shared pass")
    return view


def layers_of(model: torch.nn.Module) -> Layers:
    """Returns the adapted layers, by their name in the base."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def accumulate(gradients: Gradients) -> None:
    """Adds gradients to those of earlier micro-batches: to all of them, or to none when memory runs out."""
    fresh = [(parameter, gradient) for parameter, gradient in gradients if parameter.grad is None]
    sums = [(parameter.grad, gradient) for parameter, gradient in gradients if parameter.grad is not None]
    if fresh:  # memory of their own: a part of a stack would keep the gradients of all members
        copies = torch._foreach_mul([gradient for _, gradient in fresh], 1.0)
        for (parameter, _), copy in zip(fresh, copies, strict=True):
            parameter.grad = copy
    if sums:
        torch._foreach_add_(*map(list, zip(*sums, strict=True)))
