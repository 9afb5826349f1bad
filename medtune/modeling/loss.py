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

LOGITS_CHUNK = (
    256  # taught positions whose logits exist at the same time: 128,256 tokens make them the peak of all memory
)


def unwrap_peft(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The causal model itself; an adapter's layers are inside it, and act as long as they are not disabled."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def autocast_for(base: PreTrainedModel) -> AbstractContextManager[Any]:
    """The arithmetic of training: autocast on a GPU, where it runs the float32 adapter in the base's 16 bits.

    On a CPU autocast only costs time.
    """
    if base.device.type == "cpu" or base.dtype is torch.float32:
        return nullcontext()
    return torch.autocast(base.device.type, dtype=base.dtype)


@dataclass
class TargetPositions:
    """The taught tokens of some rows: `rows` and `places` of the hidden states that predict them, and `targets`, the
    tokens themselves; all [taught]."""

    rows: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "TargetPositions":
        """The same on a device."""
        return TargetPositions(self.rows.to(device), self.places.to(device), self.targets.to(device))


def find_targets(labels: torch.Tensor, ignore_index: int = -100) -> TargetPositions:
    """The taught tokens of `labels` [rows, length]. A GPU is asked how many those are, and waited for."""
    rows, places = (labels[:, 1:] != ignore_index).nonzero(as_tuple=True)
    return TargetPositions(rows, places, labels[rows, places + 1])


def target_hidden(
    base: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, taught: TargetPositions
) -> torch.Tensor:
    """Hidden states [taught, width] that predict a taught token."""
    hidden = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return hidden[taught.rows, taught.places]


def chunked_logits(
    base: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each piece of the positions: negative log-likelihood of every target, and whether it is the first choice."""
    head = base.get_output_embeddings()
    for part, ids in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True):
        logits = head(part).float()
        yield F.cross_entropy(logits, ids, reduction="none"), logits.argmax(-1) == ids


def add_target_loss(base: PreTrainedModel) -> None:
    """Teach a causal model's forward `taught`: it then returns their summed negative log-likelihood.

    Only taught positions go through the vocabulary projection, which costs more than anything else in a step where all
    do. It is the model's own forward, so that DDP's and autocast's hooks around it hold.
    """
    plain = base.forward

    @wraps(type(base).forward)  # generate() looks for the arguments that a model takes
    def forward(self: PreTrainedModel, *args: Any, taught: TargetPositions | None = None, **kwargs: Any) -> Any:
        if taught is None:
            return plain(*args, **kwargs)
        hidden = target_hidden(self, kwargs["input_ids"], kwargs["attention_mask"], taught)
        head = self.get_output_embeddings()
        parts = zip(hidden.split(LOGITS_CHUNK), taught.targets.split(LOGITS_CHUNK), strict=True)
        return torch.stack([F.cross_entropy(head(h).float(), ids, reduction="sum") for h, ids in parts]).sum()

    base.forward = types.MethodType(forward, base)
