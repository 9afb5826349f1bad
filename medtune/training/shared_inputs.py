"""conf/data + conf/model + conf/quantization -> what the members of a sweep share: token ids and one frozen base model.

It is built once for all members that agree in these. Nothing that a member does may change it.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.config.schema import RunConfig
from medtune.config.serialize import config_hash, to_plain
from medtune.data.prepared import PreparedData
from medtune.data.store import SPLITS
from medtune.data.tokenization.dataset import TokenizedSplits, tokenize
from medtune.data.tokenization.mask_check import MaskReport, verify_mask
from medtune.evaluation.answers import Answer, Question, answer, questions
from medtune.evaluation.eval_set import EvalSet, build_eval_set, fingerprint_of
from medtune.evaluation.likelihood import Likelihood, likelihood
from medtune.evaluation.output_cache import cache_key, load_likelihood, save_likelihood
from medtune.evaluation.pipeline import evaluate_base
from medtune.evaluation.subject import Subject
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
    """The base model on the validation set: its losses, and its answers to what every evaluation asks."""

    likelihood: Likelihood
    answers: list[Answer]


@dataclass
class SharedInputs:
    """What members share.

    `data`: the prepared conversations, and `tokens` their token ids. `mask`: the report on their loss mask.
    `fingerprint`: sha256 of the frozen base model, and `checksums` of it on a GPU. `baselines`: by what was asked.
    """

    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    tokens: TokenizedSplits
    mask: MaskReport
    base: PreTrainedModel
    fingerprint: str
    checksums: list[torch.Tensor]
    baselines: dict[str, Baseline] = field(default_factory=dict)

    def questions(self, run: RunConfig) -> list[Question]:
        """Returns what every evaluation of a run asks."""
        return questions(run, self.tokens.validation, self.data.validation)

    def baseline(self, run: RunConfig) -> Baseline:
        """Evaluates the base model on the validation set, once for all members and later runs that ask the same."""
        key = config_hash(to_plain(run.eval))
        if key not in self.baselines:
            self.baselines[key] = self.evaluate_baseline(run)
        return self.baselines[key]

    def evaluate_baseline(self, run: RunConfig) -> Baseline:
        """Takes the baseline from the cache, or else evaluates the base model."""
        rows, asked, evaluation = self.tokens.validation, self.questions(run), run.eval
        size, batch = evaluation.max_new_tokens, evaluation.batch_size
        key = cache_key(fingerprint_of(rows, asked), size, batch, self.subject(self.base))

        def compute(folder: Path) -> None:
            losses = likelihood(self.base, rows["input_ids"][:], rows["labels"][:], batch)
            save_likelihood(folder / "loss.npz", losses)
            answers = answer(self.base, self.tokenizer, asked, size, batch)
            write_json(folder / "answers.json", {"answers": [asdict(each) for each in answers]})

        folder = cached_folder(f"baseline-{key}", compute)
        answers = [Answer(**row) for row in read_json(folder / "answers.json")["answers"]]
        return Baseline(load_likelihood(folder / "loss.npz"), answers)

    def subject(self, model: PeftModel | PreTrainedModel, adapter: Path | None = None) -> Subject:
        """Returns a model on this base as evaluation takes it. `adapter`: the folder of its saved adapter."""
        return Subject(model, self.tokenizer, self.fingerprint, adapter)

    def eval_set(self, run: RunConfig) -> EvalSet | None:
        """Returns what the trained adapter is evaluated on; None if the test set is empty."""
        if not len(self.tokens.test):
            return None
        return build_eval_set(self.tokens, self.data, run.eval, run.data.system_prompt)

    def evaluate_base(self, run: RunConfig) -> None:
        """Evaluates the base model on the test set; the outputs are stored for all of its adapters."""
        eval_set = self.eval_set(run)
        if eval_set is not None:
            evaluate_base(self.subject(self.base), eval_set, run.eval)

    def require_unchanged(self) -> None:
        """Raises `Changed` when a bit of the base model, on a GPU a sum of its bytes, differs from what was loaded."""
        if self.checksums:
            pairs = zip(self.checksums, checksums(self.base), strict=True)
            same = all(torch.equal(before, now) for before, now in pairs)
        else:
            same = fingerprint(self.base) == self.fingerprint and cache_matches(self.base)
        if not same:
            raise Changed("training changed the frozen base model: its members cannot be compared; run them again")

    def metadata(self, run: RunConfig) -> dict[str, Any]:
        """Returns what run.json says of the inputs."""
        return {
            "data_fingerprint": self.data.fingerprint,
            "data": self.data.report,
            "mask": self.mask.as_json(),
            "base": {
                "hub_id": run.model.hub_id,
                "revision": run.model.revision,
                "fingerprint": self.fingerprint,
            },
        }


def load_shared_inputs(run: RunConfig, data: PreparedData) -> SharedInputs:
    """Builds what a run shares with other members, from its prepared conversations.

    What is cheap to refuse comes first. Raises `UserError` when the base model cannot be had, does not fit into the
    memory or reads too few tokens, and when the loss mask is wrong.
    """
    device = device_for(run.model)
    require_memory(run.model, run.quantization, device)
    if run.lora.lora_dropout:
        require_kernel(device)
    tokenizer = load_tokenizer(run.model)
    tokens = tokenize(tokenizer, data, run.trainer.max_length)
    splits = [(getattr(tokens, name), getattr(data, name)) for name in SPLITS]
    mask = verify_mask(tokenizer, collator(tokenizer), splits, run.model.stop_tokens)
    log.info("mask: %s", mask)
    base = load_base(run.model, run.quantization, tokenizer, device)
    require_context(base, run.trainer.max_length)
    sums = checksums(base) if device.type == "cuda" else []
    return SharedInputs(data, tokenizer, tokens, mask, base, fingerprint(base), sums)
