"""conf/data + conf/model + conf/quantization -> what members of a sweep share: token ids, and one frozen base.

It is built once for all members that agree in these, and nothing that a member does may change it.
"""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.config.schema import RunConfig
from medtune.config.serialize import config_hash, to_plain
from medtune.data.prepared import PreparedData
from medtune.data.store import SPLITS
from medtune.data.tokenization.dataset import TokenizedSplits, tokenize
from medtune.data.tokenization.mask_check import MaskReport, verify_mask
from medtune.evaluation.answers import Answer, Question, answer, questions
from medtune.evaluation.eval_set import EvalSet, build_eval_set
from medtune.evaluation.likelihood import Likelihood, likelihood
from medtune.evaluation.output_cache import cache_key, load_likelihood, save_likelihood
from medtune.evaluation.pipeline import evaluate_base
from medtune.modeling.base import device_for, load_base, require_context
from medtune.modeling.frozen_base import cache_matches, checksums, fingerprint
from medtune.modeling.lora.dropout import require_kernel
from medtune.modeling.memory import require_memory
from medtune.modeling.tokenizer import load_tokenizer
from medtune.runtime.cache import cached_folder
from medtune.runtime.files import read_json, write_json
from medtune.training.trainer import collator

log = logging.getLogger(__name__)


class Changed(Exception):
    """A frozen tensor is no longer what it was."""


@dataclass
class Baseline:
    """What the base does on the validation set: the loss, and answers to what is asked at every evaluation."""

    likelihood: Likelihood
    answers: list[Answer]


@dataclass
class SharedInputs:
    """What members share.

    `fingerprint`: sha256 of the frozen base, and `checksums` of it on a GPU; `proof`: of what is taught.
    """

    conversations: PreparedData
    tokenizer: PreTrainedTokenizerBase
    tokens: TokenizedSplits
    proof: MaskReport
    base: PreTrainedModel
    fingerprint: str
    checksums: list[torch.Tensor]
    baselines: dict[str, Baseline] = field(default_factory=dict)

    def questions(self, run: RunConfig) -> list[Question]:
        """What is asked at every evaluation."""
        return questions(run, self.tokens.validation, self.conversations.validation)

    def baseline(self, run: RunConfig) -> Baseline:
        """What the base does before it is tuned, measured once for all members and later runs that ask the same."""
        name = config_hash(to_plain(run.eval))
        if name not in self.baselines:
            self.baselines[name] = self.evaluate_baseline(run)
        return self.baselines[name]

    def evaluate_baseline(self, run: RunConfig) -> Baseline:
        """From the cache, or else from the base."""
        rows, asked, evaluation = self.tokens.validation, self.questions(run), run.eval
        exam = EvalSet(rows, [], [], [], asked, [])
        evaluation = replace(evaluation, final_max_new_tokens=evaluation.max_new_tokens)
        name = cache_key(exam, evaluation, self.base, self.fingerprint, None)

        def measure(folder: Path) -> None:
            found = likelihood(self.base, rows["input_ids"][:], rows["labels"][:], evaluation.batch_size)
            save_likelihood(folder / "loss.npz", found)
            answers = answer(self.base, self.tokenizer, asked, evaluation.max_new_tokens, evaluation.batch_size)
            write_json(folder / "answers.json", {"answers": [asdict(each) for each in answers]})

        folder = cached_folder(f"untuned-{name}", measure)
        answers = [Answer(**row) for row in read_json(folder / "answers.json")["answers"]]
        return Baseline(load_likelihood(folder / "loss.npz"), answers)

    def examination(self, run: RunConfig) -> EvalSet | None:
        """What the trained adapter is measured on; None if the test set is empty."""
        if not len(self.tokens.test):
            return None
        return build_eval_set(self.tokens, self.conversations, run.eval, run.data.system_prompt)

    def test_base(self, run: RunConfig) -> None:
        """Measure the base on the test set; what is found is stored for all of its adapters."""
        exam = self.examination(run)
        if exam is not None:
            evaluate_base(self.base, self.tokenizer, exam, run.eval, self.fingerprint)

    def require_unchanged(self) -> None:
        """Raises `Changed` when a bit of the base, on a GPU a sum of its bytes, differs from what was loaded."""
        if self.checksums:
            pairs = zip(self.checksums, checksums(self.base), strict=True)
            same = all(torch.equal(before, now) for before, now in pairs)
        else:
            same = fingerprint(self.base) == self.fingerprint and cache_matches(self.base)
        if not same:
            raise Changed("the frozen base was changed in training: its members cannot be compared; run them again")

    def metadata(self, run: RunConfig) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "data_fingerprint": self.conversations.fingerprint,
            "data": self.conversations.report,
            "mask": to_plain(self.proof) | {"taught_share": self.proof.taught_share},
            "base": {
                "hub_id": run.model.hub_id,
                "revision": run.model.revision,
                "fingerprint": self.fingerprint,
            },
        }


def load_shared_inputs(run: RunConfig, conversations: PreparedData) -> SharedInputs:
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
    proof = verify_mask(tokenizer, collator(tokenizer), splits, run.model.stop_tokens)
    log.info("mask: %s", proof)
    base = load_base(run.model, run.quantization, tokenizer, device)
    require_context(base, run.trainer.max_length)
    sums = checksums(base) if device.type == "cuda" else []
    return SharedInputs(conversations, tokenizer, tokens, proof, base, fingerprint(base), sums)
