"""Losses and answers of a model on disk, under a name made of everything they depend on."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from transformers import PreTrainedModel

from medtune.config.schema import Eval
from medtune.data.tokenization import chat_template as conversation
from medtune.evaluation import answers as samples
from medtune.evaluation import likelihood
from medtune.evaluation.answers import Answer
from medtune.evaluation.eval_set import EvalSet
from medtune.evaluation.likelihood import Likelihood
from medtune.modeling import base as base_model
from medtune.modeling import fused_layers as fused
from medtune.modeling import generation as decoding
from medtune.modeling import kernels
from medtune.modeling import quantized as frozen
from medtune.modeling.lora import linear as low_rank
from medtune.modeling.lora.files import config_of, weights_of
from medtune.runtime.environment import versions

VERSIONED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")  # packages that decide what a model says

# A change of these, or of the kernels, may change what is measured.
VERSIONED_MODULES: tuple[ModuleType, ...] = (
    conversation,
    likelihood,
    samples,
    decoding,
    base_model,
    frozen,
    fused,
    low_rank,
)


def load_or_compute(path: Path, make: Callable[[], Likelihood], seconds: dict[str, float]) -> Likelihood:
    """What a file holds, or what `make` gives, which is then written, and its seconds noted."""
    if not path.is_file():
        began = time.monotonic()
        save_likelihood(path, make())
        seconds[path.stem] = round(time.monotonic() - began, 1)
    return load_likelihood(path)


def save_likelihood(path: Path, found: Likelihood) -> None:
    """Write a likelihood as a NumPy archive."""
    unfinished = path.with_suffix(".tmp.npz")  # a reader never meets half of it
    np.savez(unfinished, nll=found.nll, tokens=found.tokens, correct=found.correct)
    unfinished.replace(path)


def load_likelihood(path: Path) -> Likelihood:
    """Read what `save_likelihood` wrote."""
    with np.load(path) as arrays:
        return Likelihood(arrays["nll"], arrays["tokens"], arrays["correct"])


def stored_answers(path: Path) -> dict[int, Answer]:
    """Answers by the place of their question, cut to whole lines: an interrupted last one is asked again."""
    if not path.is_file():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    return {row["place"]: Answer(row["text"], row["stop"], row["tokens"]) for row in rows}


def cache_key(
    exam: EvalSet, evaluation: Eval, base: PreTrainedModel, base_fingerprint: str, adapter: Path | None
) -> str:
    """A name for what `measure` finds: of the model to the bit, of what it is asked, and of the arithmetic."""
    files = [] if adapter is None else [weights_of(adapter), config_of(adapter)]
    weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    files_of_code = [
        *(Path(str(module.__file__)) for module in VERSIONED_MODULES),
        *sorted(kernels.FOLDER.glob("*.py")),
    ]
    code = [path.read_text(encoding="utf-8") for path in files_of_code]
    device = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else "cpu"
    settings = [
        evaluation.final_max_new_tokens,
        evaluation.batch_size,
        device,
        str(base.dtype),
        versions(VERSIONED_PACKAGES),
    ]
    stops = base.generation_config.eos_token_id
    parts = [base_fingerprint, weights, exam.fingerprint, settings, stops, code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
