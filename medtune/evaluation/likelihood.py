"""Rows of token ids -> the likelihood of their taught tokens, in training and in evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from medtune.data.tokenization.dataset import IGNORE_INDEX
from medtune.modeling.loss import autocast_for, chunked_logits, find_targets, target_hidden, unwrap_peft
from medtune.results.metrics import perplexity
from medtune.runtime import interruption
from medtune.runtime.progress import track_work


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
    base = unwrap_peft(model)
    result = Likelihood(*(np.zeros(len(input_ids)) for _ in range(3)))
    mode = model.training
    model.eval()
    with autocast_for(base):
        for rows in batches_by_length([len(ids) for ids in input_ids], batch, "conversations"):
            ids, wanted = padded([input_ids[i] for i in rows], 0), padded([labels[i] for i in rows], IGNORE_INDEX)
            mask, taught = padded([[1] * len(input_ids[i]) for i in rows], 0), find_targets(wanted)
            owners = np.array(rows)[taught.rows.numpy()]
            taught = taught.to(base.device)
            hidden = target_hidden(base, ids.to(base.device), mask.to(base.device), taught)
            nll, correct = zip(*chunked_logits(base, hidden, taught.targets), strict=True)
            np.add.at(result.nll, owners, torch.cat(nll).double().cpu().numpy())
            np.add.at(result.correct, owners, torch.cat(correct).cpu().numpy())
            np.add.at(result.tokens, owners, 1)
    model.train(mode)
    return result


def batches_by_length(lengths: Sequence[int], size: int, unit: str) -> Iterator[list[int]]:
    """Yields the indices of rows, `size` at a time, and reports progress in `unit`.

    The longest come first: memory runs out at once or never.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    with track_work("evaluating", unit, len(order)) as advance:
        for start in range(0, len(order), size):
            interruption.raise_if_requested()
            rows = order[start : start + size]
            yield rows
            advance(len(rows))


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows as one tensor [rows, longest], filled up on the right."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)
