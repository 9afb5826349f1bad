"""Rows of token ids -> the likelihood of their target tokens, in training and in evaluation."""

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
    """How likely a model finds each row: arrays [rows].

    `nll`: negative log-likelihood in nats, summed over the row's target tokens. `tokens`: how many those are.
    `correct`: how many of them the model ranks first.
    """

    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per target token; every token weighs the same, whatever row it is in."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return perplexity(self.loss)

    @property
    def token_accuracy(self) -> float:
        """Share of the target tokens that the model ranks first."""
        return float(self.correct.sum() / self.tokens.sum())


@torch.no_grad()
def likelihood(
    model: PeftModel | PreTrainedModel, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], batch: int
) -> Likelihood:
    """Returns the likelihood of the tokens that `labels` do not ignore, from passes of `batch` rows.

    Rows of about the same length share a pass, so that little is spent on padding. Only target positions go through the
    vocabulary projection, a few hundred at a time: memory does not grow with the set. No random number is drawn and the
    model's mode is restored, so training continues as if there had been no evaluation.
    """
    base = unwrap_peft(model)
    result = Likelihood(*(np.zeros(len(input_ids)) for _ in range(3)))
    mode = model.training
    model.eval()
    with autocast_for(base):
        for rows in batches_by_length([len(ids) for ids in input_ids], batch, "conversations"):
            ids, wanted = padded([input_ids[i] for i in rows], 0), padded([labels[i] for i in rows], IGNORE_INDEX)
            mask, targets = padded([[1] * len(input_ids[i]) for i in rows], 0), find_targets(wanted)
            owners = np.array(rows)[targets.rows.numpy()]
            targets = targets.to(base.device)
            hidden = target_hidden(base, ids.to(base.device), mask.to(base.device), targets)
            nll, correct = zip(*chunked_logits(base, hidden, targets.ids), strict=True)
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
    """Returns rows as one tensor [rows, longest], padded with `value` on the right."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)
