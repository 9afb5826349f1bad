"""conf/data + conf/model + conf/quantization -> what members of a sweep share: token ids, and one frozen base.

It is built once for all members that agree in these, and nothing that a member does may change it.
"""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.config.schema import Run
from medtune.config.serialize import hash_of, plain
from medtune.data.prepared import Conversations
from medtune.data.store import SPLITS
from medtune.data.tokenization.dataset import Tokens, tokenize
from medtune.data.tokenization.mask_check import Proof, prove
from medtune.evaluation.answers import Answer, Question, answer, questions
from medtune.evaluation.eval_set import Examination, examination
from medtune.evaluation.likelihood import Likelihood, likelihood
from medtune.evaluation.output_cache import load_likelihood, name_of, save_likelihood
from medtune.evaluation.pipeline import measure_base
from medtune.modeling.base import device_for, load_base, require_context
from medtune.modeling.frozen_base import checksums, fingerprint, intact
from medtune.modeling.lora.dropout import require_kernel
from medtune.modeling.memory import require_memory
from medtune.modeling.tokenizer import load_tokenizer
from medtune.runtime.cache import cached
from medtune.runtime.files import read_json, write_json
from medtune.training.trainer import collator

log = logging.getLogger(__name__)


class Changed(Exception):
    """A frozen tensor is no longer what it was."""


@dataclass
class Untuned:
    """What the base does on the validation set: the loss, and answers to what is asked at every evaluation."""

    likelihood: Likelihood
    answers: list[Answer]


@dataclass
class Foundation:
    """What members share.

    `fingerprint`: sha256 of the frozen base, and `checksums` of it on a GPU; `proof`: of what is taught.
    """

    conversations: Conversations
    tokenizer: PreTrainedTokenizerBase
    tokens: Tokens
    proof: Proof
    base: PreTrainedModel
    fingerprint: str
    checksums: list[torch.Tensor]
    measured: dict[str, Untuned] = field(default_factory=dict)

    def questions(self, run: Run) -> list[Question]:
        """What is asked at every evaluation."""
        return questions(run, self.tokens.validation, self.conversations.validation)

    def untuned(self, run: Run) -> Untuned:
        """What the base does before it is tuned, measured once for all members and later runs that ask the same."""
        name = hash_of(plain(run.eval))
        if name not in self.measured:
            self.measured[name] = self.measure_untuned(run)
        return self.measured[name]

    def measure_untuned(self, run: Run) -> Untuned:
        """From the cache, or else from the base."""
        rows, asked, evaluation = self.tokens.validation, self.questions(run), run.eval
        exam = Examination(rows, [], [], [], asked, [])
        evaluation = replace(evaluation, final_max_new_tokens=evaluation.max_new_tokens)
        name = name_of(exam, evaluation, self.base, self.fingerprint, None)

        def measure(folder: Path) -> None:
            found = likelihood(self.base, rows["input_ids"][:], rows["labels"][:], evaluation.batch_size)
            save_likelihood(folder / "loss.npz", found)
            answers = answer(self.base, self.tokenizer, asked, evaluation.max_new_tokens, evaluation.batch_size)
            write_json(folder / "answers.json", {"answers": [asdict(each) for each in answers]})

        folder = cached(f"untuned-{name}", measure)
        answers = [Answer(**row) for row in read_json(folder / "answers.json")["answers"]]
        return Untuned(load_likelihood(folder / "loss.npz"), answers)

    def examination(self, run: Run) -> Examination | None:
        """What the trained adapter is measured on; None if the test set is empty."""
        if not len(self.tokens.test):
            return None
        return examination(self.tokens, self.conversations, run.eval, run.data.system_prompt)

    def test_base(self, run: Run) -> None:
        """Measure the base on the test set; what is found is stored for all of its adapters."""
        exam = self.examination(run)
        if exam is not None:
            measure_base(self.base, self.tokenizer, exam, run.eval, self.fingerprint)

    def require_unchanged(self) -> None:
        """Raises `Changed` when a bit of the base, on a GPU a sum of its bytes, differs from what was loaded."""
        if self.checksums:
            pairs = zip(self.checksums, checksums(self.base), strict=True)
            same = all(torch.equal(before, now) for before, now in pairs)
        else:
            same = fingerprint(self.base) == self.fingerprint and intact(self.base)
        if not same:
            raise Changed("the frozen base was changed in training: its members cannot be compared; run them again")

    def facts(self, run: Run) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "data_fingerprint": self.conversations.fingerprint,
            "data": self.conversations.report,
            "mask": plain(self.proof) | {"taught_share": self.proof.taught_share},
            "base": {
                "hub_id": run.model.hub_id,
                "revision": run.model.revision,
                "fingerprint": self.fingerprint,
            },
        }


def lay(run: Run, conversations: Conversations) -> Foundation:
    """Build what a run stands on, from its prepared conversations.

    What is cheap to refuse comes first. Raises `Refusal` when the base cannot be had, does not fit into the memory or
    reads too few tokens, and when the mask is not proved.
    """
    device = device_for(run.model)
    require_memory(run.model, run.quantization, device)
    if run.lora.lora_dropout:
        require_kernel(device)
    tokenizer = load_tokenizer(run.model)
    tokens = tokenize(tokenizer, conversations, run.trainer.max_length)
    splits = [(getattr(tokens, name), getattr(conversations, name)) for name in SPLITS]
    proof = prove(tokenizer, collator(tokenizer), splits, run.model.stop_tokens)
    log.info("mask: %s", proof)
    base = load_base(run.model, run.quantization, tokenizer, device)
    require_context(base, run.trainer.max_length)
    sums = checksums(base) if device.type == "cuda" else []
    return Foundation(conversations, tokenizer, tokens, proof, base, fingerprint(base), sums)
