"""What comes of an optimizer step: its tokens are counted, and nothing follows it if a number is not finite."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from medtune.trainer import AdapterTrainer


class Diverged(Exception):
    """The loss or a gradient is no longer a number; nothing after this step may be kept."""


class Outcome(TrainerCallback):
    """Looks at every step of a trainer.

    A GPU is asked, and waited for, once, when all work of the step is on its way to it. (bitsandbytes' optimizers wait
    for it all the same, at each tensor, and fp16's scaler once.)

    `losses`, `tokens`: of each micro-batch of the step. `answer`: the step's tokens, whether its losses are finite, and
    whether its gradients are.
    """

    answer: torch.Tensor

    def __init__(self, trainer: "AdapterTrainer") -> None:
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer: asks, while there are gradients, what `on_step_end` reads."""
        losses, tokens = torch.stack(self.losses), torch.stack(self.tokens).sum()
        self.losses, self.tokens = [], []
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        # With fp16 the gradient scaler meets infinities by design, and skips their step.
        norms = torch.zeros(1, device=losses.device) if args.fp16 else torch.stack(torch._foreach_norm(gradients))
        self.answer = torch.stack([tokens, torch.isfinite(losses).all(), torch.isfinite(norms).all()])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer. Raises `Diverged`: the weights are spoiled, and are neither saved nor measured."""
        if self.trainer.place:
            self.trainer.place.step_aside()
        tokens, loss_is_finite, gradient_is_finite = self.answer.tolist()
        state.num_input_tokens_seen += tokens
        if not (loss_is_finite and gradient_is_finite):
            what = "a gradient is not finite" if loss_is_finite else "the loss is not finite"
            raise Diverged(f"{what} at step {state.global_step}: lower the learning rate")
