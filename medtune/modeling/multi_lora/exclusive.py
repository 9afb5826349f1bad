"""The handle of a run that has a GPU's base model to itself: its passes are those of a group of one, and captured."""

import torch
from transformers import PreTrainedModel

from medtune.modeling.multi_lora.backbone import Backbone, ForwardPass, MicroBatch, accumulate, proxy_base


class ExclusiveHandle:
    """A `BaseHandle` without other members."""

    def __init__(self, base: PreTrainedModel, checkpointing: bool, attention: str, longest: int) -> None:
        self.base, self.checkpointing = base, checkpointing
        self.backbone = Backbone(base, checkpointing, attention, longest)
        self.passed: ForwardPass | None = None
        self.hidden: torch.Tensor | None = None

    def view(self) -> PreTrainedModel:
        """Returns the base model as the run sees it."""
        return proxy_base(self.base, self.forward)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Returns the hidden states [rows, length, width] of a micro-batch."""
        self.passed = self.backbone.forward([batch])
        self.hidden = self.passed.output.detach().requires_grad_()
        return self.hidden

    def backward(self) -> None:
        """Propagates the gradient at the base's output through the base, to the run's adapter."""
        assert self.passed is not None and self.hidden is not None
        accumulate(self.passed.gradients([self.hidden.grad]))
        self.passed = self.hidden = None

    def yield_turn(self) -> None:
        """Does nothing: no other member has work to queue."""

    def release(self) -> None:
        """Frees the memory of adapters and captured passes."""
        self.backbone.release()
