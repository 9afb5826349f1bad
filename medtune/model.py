"""conf/model + conf/quantization -> tokenizer and frozen base, ready for an adapter."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from medtune.choices import Attention, Dtype, QuantizationType, Weights
from medtune.config import Model, Quantization, Refusal
from medtune.frozen import keep_gradients_after_evaluation, place_8bit_states, unpack
from medtune.fused import CAUSAL, fuse
from medtune.memory import free_memory
from medtune.weights import from_source, locate, random_config, random_weights

log = logging.getLogger(__name__)

GIGABYTE = 1e9
# How activations are recomputed. Dropout has its own keys: nothing random happens that would have to be repeated.
RECOMPUTED = {"use_reentrant": False, "preserve_rng_state": False}


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer with `model.pad_token` as padding, on the left (answers are generated from its right end).

    Raises `Refusal` when it cannot be had, has no chat template, or lacks a token that the configuration names.
    """
    source = locate(model)
    tokenizer = from_source(
        model, lambda: AutoTokenizer.from_pretrained(source, revision=model.revision, trust_remote_code=False)
    )
    vocabulary = tokenizer.get_vocab()
    for name, tokens in (("pad_token", [model.pad_token]), ("stop_tokens", model.stop_tokens)):
        for token in tokens:
            if token not in vocabulary:
                raise Refusal(f"model.{name}: {token} is not in the vocabulary of {model.hub_id}")
    if not tokenizer.chat_template:
        raise Refusal(f"{model.hub_id} has no chat template: choose an instruct model")
    tokenizer.pad_token = model.pad_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_base(
    model: Model, quantization: Quantization | None, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """Load the base, quantized and frozen, on `device`.

    Its generation stops at any of `model.stop_tokens`, and its name is the hub id, whatever folder it came from.
    Raises `Refusal` when the weights cannot be had, or the attention kernel is not installed.
    """
    if model.attn_implementation is Attention.flash_attention_2 and not is_flash_attn_2_available():
        raise Refusal("model.attn_implementation=flash_attention_2 needs a GPU and the package flash-attn: choose sdpa")
    dtype = dtype_for(model, device)
    wanted: dict[str, Any] = {
        "dtype": dtype,
        "quantization_config": quantization_config(quantization, dtype),
        "attn_implementation": kernel(model.attn_implementation),
        "device_map": {"": device},
        "trust_remote_code": False,
    }
    if model.weights is Weights.random:
        config = random_config(model, tokenizer)
        weights: Any = random_weights(config, dtype, device)
        base = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, **wanted)
    else:
        source = locate(model)
        base = from_source(
            model, lambda: AutoModelForCausalLM.from_pretrained(source, revision=model.revision, **wanted)
        )
    base.requires_grad_(False)
    place_8bit_states(base)
    keep_gradients_after_evaluation(base)
    base.name_or_path = base.config._name_or_path = model.hub_id  # what PEFT writes into adapter_config.json
    base.config.pad_token_id = tokenizer.pad_token_id
    base.generation_config.pad_token_id = tokenizer.pad_token_id
    base.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(token) for token in model.stop_tokens]
    log.info(
        "base: %s, %s, %s, %.2f GB on %s",
        model.hub_id,
        quantization.type.name if quantization else "not quantized",
        str(dtype).removeprefix("torch."),
        base.get_memory_footprint() / GIGABYTE,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
    )
    unpack(base)
    fuse(base)
    return base


def kernel(attention: Attention) -> str:
    """The attention kernel as transformers calls it, outside of training."""
    return "sdpa" if attention is Attention.auto else attention.name


def training_kernel(model: Model, max_length: int, device: torch.device) -> str:
    """The attention kernel in training: on a CPU a step with eager attention takes 0.7 of the time with sdpa.

    It holds the whole matrix of attention, so it is left to rows of up to 1,024 tokens. On a GPU it is sdpa without a
    mask, which has the faster kernels: rows are padded on the right, where no token looks.
    """
    eager = model.attn_implementation is Attention.auto and device.type == "cpu" and max_length <= 1024
    chosen = "eager" if eager else kernel(model.attn_implementation)
    return CAUSAL if chosen == "sdpa" and device.type == "cuda" else chosen


@contextmanager
def attending(base: PreTrainedModel, with_kernel: str) -> Iterator[None]:
    """Another attention kernel, while it lasts; it is looked up at every forward pass, also at a recomputed one."""
    before = base.config._attn_implementation
    base.config._attn_implementation = with_kernel
    try:
        yield
    finally:
        base.config._attn_implementation = before


def device_for(model: Model) -> torch.device:
    """The first GPU, or the CPU. Raises `Refusal` for a model that needs a GPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if model.needs_gpu:
        raise Refusal(
            f"{model.hub_id} needs an NVIDIA GPU, and PyTorch finds none on this machine: run it where there is one, "
            "or choose a small model, as model=smollm2_135m"
        )
    return torch.device("cpu")


def dtype_for(model: Model, device: torch.device) -> torch.dtype:
    """`model.dtype` as a torch dtype; `auto` is bfloat16, or float16 on a GPU without it.

    Raises `Refusal` for float16 on a CPU.
    """
    if model.dtype is Dtype.float16 and device.type == "cpu":
        raise Refusal("model.dtype=float16 trains on a GPU only: on a CPU choose bfloat16 or float32")
    if model.dtype is not Dtype.auto:
        return getattr(torch, model.dtype.name)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def weight_bytes(model: Model, quantization: Quantization | None) -> float:
    """Memory of the base in bytes: embeddings and head stay in 16 bits, every other parameter is quantized.

    Bits per parameter as in QLoRA (arXiv:2305.14314, section 3): 4 plus 0.5 for the constants of 64-element blocks, or
    0.127 with double quantization.
    """
    full = 4 if model.dtype is Dtype.float32 else 2
    if quantization is None:
        bits = 8.0 * full
    elif quantization.type is QuantizationType.int8:
        bits = 8.0
    else:
        bits = 4.127 if quantization.double_quantization else 4.5
    quantized = model.parameters - model.embedding_parameters
    return quantized * bits / 8 + model.embedding_parameters * full


def require_memory(model: Model, quantization: Quantization | None, device: torch.device) -> None:
    """Raises `Refusal` when the weights alone do not fit into the device's free memory."""
    if device.type == "cuda":
        free_memory()  # what the member before this one left is free too
        free, where = torch.cuda.mem_get_info(device)[0], "on the GPU"
    else:
        free, where = psutil.virtual_memory().available, "in memory"
    needed = weight_bytes(model, quantization)
    if needed > free:
        stored = quantization.type.name if quantization else "full precision"
        advice = "free some, or choose a smaller model" if quantization else "choose quantization=nf4"
        raise Refusal(
            f"{model.hub_id} in {stored} needs {needed / GIGABYTE:.1f} GB for its weights alone, and "
            f"{free / GIGABYTE:.1f} GB are free {where}: {advice}"
        )


def require_context(base: PreTrainedModel, max_length: int) -> None:
    """Raises `Refusal` when conversations may be longer than the positions that the base was trained for."""
    context = base.config.max_position_embeddings
    if max_length > context:
        raise Refusal(
            f"trainer.max_length={max_length} is more than the {context} tokens that {base.name_or_path} reads"
        )


def quantization_config(quantization: Quantization | None, dtype: torch.dtype) -> Any:
    """The `BitsAndBytesConfig` of a quantization, or None. https://huggingface.co/docs/bitsandbytes"""
    if quantization is None:
        return None
    if quantization.type is QuantizationType.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type.name,
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )
