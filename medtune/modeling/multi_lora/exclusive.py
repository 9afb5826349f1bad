"""A run that has a GPU's base to itself: it goes through it as a pack of one, which can be recorded."""

import torch
from transformers import PreTrainedModel

from medtune.modeling.multi_lora.backbone import Backbone, ForwardPass, MicroBatch, accumulate, proxy_base


class ExclusiveHandle:
    """What a `Lane` is in a pack, without the others."""

    def __init__(self, base: PreTrainedModel, checkpointing: bool, attention: str, longest: int) -> None:
        self.base, self.checkpointing = base, checkpointing
        self.trunk = Backbone(base, checkpointing, attention, longest)
        self.passed: ForwardPass | None = None
        self.hidden: torch.Tensor | None = None

    def view(self) -> PreTrainedModel:
        """The base as the run sees it."""
        return proxy_base(self.base, self.through)

    def through(self, rows: MicroBatch) -> torch.Tensor:
        """Run the rows through the base; returns their hidden states."""
        self.passed = self.trunk.through([rows])
        self.hidden = self.passed.output.detach().requires_grad_()
        return self.hidden

    def backward(self) -> None:
        """Take the gradient that the run's own backward pass left at the base's output through the base."""
        assert self.passed is not None and self.hidden is not None
        accumulate(self.passed.gradients([self.hidden.grad]))
        self.passed = self.hidden = None

    def yield_turn(self) -> None:
        """There are no others."""

    def release(self) -> None:
        """What follows needs the memory."""
        self.trunk.forget()
