"""Loss on target tokens only."""

import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from medtune.modeling.forwards import replace_forward

# Target positions whose logits exist at the same time. With a vocabulary of 128,256 they are the peak of all memory.
LOGITS_CHUNK = 256


def unwrap_peft(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Returns the causal model itself. An adapter's layers are inside it, and act unless they are disabled."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def autocast_for(base: PreTrainedModel) -> AbstractContextManager[Any]:
    """Returns the arithmetic of training: autocast on a GPU, where it runs the float32 adapter in the base's 16 bits.

    On a CPU autocast only costs time.
    """
    if base.device.type == "cpu" or base.dtype is torch.float32:
        return nullcontext()
    return torch.autocast(base.device.type, dtype=base.dtype)


@dataclass
class TargetPositions:
    """The target tokens of some rows: tensors [targets].

    `rows` and `positions`: which hidden states predict them. `ids`: the tokens themselves.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    ids: torch.Tensor

    def to(self, device: torch.device) -> "TargetPositions":
        """Returns the same on a device."""
        return TargetPositions(self.rows.to(device), self.positions.to(device), self.ids.to(device))


def find_targets(labels: torch.Tensor, ignore_index: int = -100) -> TargetPositions:
    """Returns the target tokens of `labels` [rows, length]. Synchronizes with the GPU where the labels are on one."""
    rows, positions = (labels[:, 1:] != ignore_index).nonzero(as_tuple=True)
    return TargetPositions(rows, positions, labels[rows, positions + 1])


def target_hidden(
    base: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: TargetPositions
) -> torch.Tensor:
    """Returns the hidden states [targets, width] that predict a target token."""
    hidden = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return hidden[targets.rows, targets.positions]


def chunked_logits(
    base: PreTrainedModel, hidden: torch.Tensor, ids: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields for each chunk of positions the negative log-likelihood of each target, and whether it ranks first.

    `hidden`: [targets, width]. `ids`: [targets].
    """
    head = base.get_output_embeddings()
    for part, part_ids in zip(hidden.split(LOGITS_CHUNK), ids.split(LOGITS_CHUNK), strict=True):
        logits = head(part).float()
        yield F.cross_entropy(logits, part_ids, reduction="none"), logits.argmax(-1) == part_ids


def add_target_loss(base: PreTrainedModel) -> None:
    """Adds the argument `targets` to a causal model's forward: it returns their summed negative log-likelihood.

    Only target positions go through the vocabulary projection, which costs more than anything else in a step where all
    positions do. It is the model's own forward, so that the hooks of DDP and autocast around it hold.
    """
    plain = base.forward

    @wraps(type(base).forward)  # generate() looks for the arguments that a model takes
    def target_loss_forward(
        self: PreTrainedModel, *args: Any, targets: TargetPositions | None = None, **kwargs: Any
    ) -> Any:
        if targets is None:
            return plain(*args, **kwargs)
        hidden = target_hidden(self, kwargs["input_ids"], kwargs["attention_mask"], targets)
        head = self.get_output_embeddings()
        chunks = zip(hidden.split(LOGITS_CHUNK), targets.ids.split(LOGITS_CHUNK), strict=True)
        return torch.stack([F.cross_entropy(head(h).float(), ids, reduction="sum") for h, ids in chunks]).sum()

    replace_forward(base, types.MethodType(target_loss_forward, base), "loss on target tokens")
