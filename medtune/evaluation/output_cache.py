"""Losses and answers of a model on disk, under a name made of everything they depend on."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from medtune.data.tokenization import chat_template
from medtune.evaluation import answers, likelihood
from medtune.evaluation.answers import Answer
from medtune.evaluation.likelihood import Likelihood
from medtune.evaluation.subject import Subject
from medtune.modeling import (
    attention,
    base,
    cuda_graphs,
    forwards,
    frozen_base,
    fused_layers,
    generation,
    kernels,
    loss,
    quantized,
    tokenizer,
)
from medtune.modeling.lora import adapter, linear
from medtune.modeling.lora.files import config_of, weights_of
from medtune.runtime.environment import versions
from medtune.runtime.files import json_lines

VERSIONED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")  # packages that decide what a model answers

# A change of one of these, or of a kernel, may change losses and answers.
VERSIONED_MODULES: tuple[ModuleType, ...] = (
    chat_template, likelihood, loss, answers, generation, cuda_graphs, base, tokenizer, attention, quantized,
    frozen_base, forwards, fused_layers, adapter, linear,
)  # fmt: skip


def cache_key(shown: str, max_new_tokens: int, batch_size: int, subject: Subject) -> str:
    """Returns a name for the outputs of a model: it changes with anything that may change them.

    `shown`: the fingerprint of what the model is shown (`eval_set.fingerprint_of`). The rest names the model to the
    bit, the way it is asked, and the code and packages that compute.
    """
    files = [] if subject.adapter is None else [weights_of(subject.adapter), config_of(subject.adapter)]
    weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    code_files = [Path(str(module.__file__)) for module in VERSIONED_MODULES]
    code = [path.read_text(encoding="utf-8") for path in [*code_files, *sorted(kernels.FOLDER.glob("*.py"))]]
    model = subject.base
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    settings = [max_new_tokens, batch_size, device, str(model.dtype), versions(VERSIONED_PACKAGES)]
    stops = model.generation_config.eos_token_id
    parts = [subject.base_fingerprint, weights, shown, settings, stops, code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def load_or_compute(path: Path, compute: Callable[[], Likelihood], seconds: dict[str, float]) -> Likelihood:
    """Returns what a file holds. Computes and writes it first where it is missing, and notes the seconds it took."""
    if not path.is_file():
        began = time.monotonic()
        save_likelihood(path, compute())
        seconds[path.stem] = round(time.monotonic() - began, 1)
    return load_likelihood(path)


def save_likelihood(path: Path, found: Likelihood) -> None:
    """Writes a likelihood as a NumPy archive."""
    unfinished = path.with_suffix(".tmp.npz")  # a reader never meets half a file
    np.savez(unfinished, nll=found.nll, tokens=found.tokens, correct=found.correct)
    unfinished.replace(path)


def load_likelihood(path: Path) -> Likelihood:
    """Reads what `save_likelihood` wrote."""
    with np.load(path) as arrays:
        return Likelihood(arrays["nll"], arrays["tokens"], arrays["correct"])


def stored_answers(path: Path) -> dict[int, Answer]:
    """Returns answers by the index of their question. Removes an interrupted last line: its question is asked again."""
    if not path.is_file():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    return {row["place"]: Answer(row["text"], row["stop"], row["tokens"]) for row in json_lines(whole)}
