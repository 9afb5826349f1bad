"""Rows of token ids -> the likelihood of their taught tokens, in training and in evaluation."""

import types
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from medtune import interruption
from medtune.metrics import perplexity
from medtune.progress import bars
from medtune.tokens import IGNORED

PIECE = 256  # taught positions whose logits exist at the same time: 128,256 tokens make them the peak of all memory


@dataclass
class Likelihood:
    """What a model thinks of each row: arrays [rows].

    `nll`: negative log-likelihood in nats, summed over the row's taught tokens. `tokens`: how many those are.
    `correct`: for how many of them the model's first choice is the right one.
    """

    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per taught token; every token weighs the same, whatever row it is in."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return perplexity(self.loss)

    @property
    def token_accuracy(self) -> float:
        """Share of the taught tokens that are the model's first choice."""
        return float(self.correct.sum() / self.tokens.sum())


@torch.no_grad()
def likelihood(
    model: PeftModel | PreTrainedModel, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], batch: int
) -> Likelihood:
    """Likelihood of the tokens that `labels` do not ignore, `batch` rows at a time.

    Rows of about the same length are taken together, so that little is spent on padding, and only taught positions go
    through the vocabulary projection, a few hundred at a time: memory does not grow with the set. No random number is
    drawn and the model's mode is restored, so training goes on as if nothing had been asked.
    """
    base = base_of(model)
    result = Likelihood(*(np.zeros(len(input_ids)) for _ in range(3)))
    mode = model.training
    model.eval()
    with arithmetic(base):
        for rows in batches_by_length([len(ids) for ids in input_ids], batch, "evaluate"):
            ids, wanted = padded([input_ids[i] for i in rows], 0), padded([labels[i] for i in rows], IGNORED)
            mask, taught = padded([[1] * len(input_ids[i]) for i in rows], 0), taught_in(wanted)
            owners = np.array(rows)[taught.rows.numpy()]
            taught = taught.to(base.device)
            hidden = taught_hidden(base, ids.to(base.device), mask.to(base.device), taught)
            nll, correct = zip(*pieces(base, hidden, taught.targets), strict=True)
            np.add.at(result.nll, owners, torch.cat(nll).double().cpu().numpy())
            np.add.at(result.correct, owners, torch.cat(correct).cpu().numpy())
            np.add.at(result.tokens, owners, 1)
    model.train(mode)
    return result


def base_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The causal model itself; an adapter's layers are inside it, and act as long as they are not disabled."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def arithmetic(base: PreTrainedModel) -> AbstractContextManager[Any]:
    """The arithmetic of training: autocast on a GPU, where it runs the float32 adapter in the base's 16 bits.

    On a CPU autocast only costs time.
    """
    if base.device.type == "cpu" or base.dtype is torch.float32:
        return nullcontext()
    return torch.autocast(base.device.type, dtype=base.dtype)


def batches_by_length(lengths: Sequence[int], size: int, doing: str) -> Iterator[list[int]]:
    """Places of rows, longest first (memory is short at once or never), `size` at a time, with a bar."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    with tqdm(total=len(order), desc=doing, unit=" rows", leave=False, disable=not bars()) as bar:
        for start in range(0, len(order), size):
            interruption.check()
            rows = order[start : start + size]
            yield rows
            bar.update(len(rows))


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows as one tensor [rows, longest], filled up on the right."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)


@dataclass
class Taught:
    """The taught tokens of some rows: `rows` and `places` of the hidden states that predict them, and `targets`, the
    tokens themselves; all [taught]."""

    rows: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "Taught":
        """The same on a device."""
        return Taught(self.rows.to(device), self.places.to(device), self.targets.to(device))


def taught_in(labels: torch.Tensor) -> Taught:
    """The taught tokens of `labels` [rows, length]. A GPU is asked how many those are, and waited for."""
    rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return Taught(rows, places, labels[rows, places + 1])


def taught_hidden(
    base: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, taught: Taught
) -> torch.Tensor:
    """Hidden states [taught, width] that predict a taught token."""
    hidden = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return hidden[taught.rows, taught.places]


def pieces(
    base: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each piece of the positions: negative log-likelihood of every target, and whether it is the first choice."""
    head = base.get_output_embeddings()
    for part, ids in zip(hidden.split(PIECE), targets.split(PIECE), strict=True):
        logits = head(part).float()
        yield F.cross_entropy(logits, ids, reduction="none"), logits.argmax(-1) == ids


def add_taught_loss(base: PreTrainedModel) -> None:
    """Teach a causal model's forward `taught`: it then returns their summed negative log-likelihood.

    Only taught positions go through the vocabulary projection, which costs more than anything else in a step where all
    do. It is the model's own forward, so that DDP's and autocast's hooks around it hold.
    """
    plain = base.forward

    @wraps(type(base).forward)  # generate() looks for the arguments that a model takes
    def forward(self: PreTrainedModel, *args: Any, taught: Taught | None = None, **kwargs: Any) -> Any:
        if taught is None:
            return plain(*args, **kwargs)
        hidden = taught_hidden(self, kwargs["input_ids"], kwargs["attention_mask"], taught)
        head = self.get_output_embeddings()
        parts = zip(hidden.split(PIECE), taught.targets.split(PIECE), strict=True)
        return torch.stack([F.cross_entropy(head(h).float(), ids, reduction="sum") for h, ids in parts]).sum()

    base.forward = types.MethodType(forward, base)
