"""A run -> the memory that training it takes beside the base, before it is trained."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from medtune.config.enums import Dtype, QuantizationType
from medtune.config.schema import Model, Quantization, RunConfig
from medtune.modeling import kernels
from medtune.modeling.loss import LOGITS_CHUNK
from medtune.runtime.errors import UserError


def training_bytes(run: RunConfig, base: PreTrainedModel, checkpointing: bool) -> float:
    """Memory in bytes that one member takes beside the base: adapter, optimizer, activations, logits.

    Activations per token and layer are counted as in Korthikanti et al. (arXiv:2205.05198, section 4.1), with Llama's
    widths and without the attention matrix, which fused kernels never store: in the base's precision the inputs of
    projections, norms and products. Where SwiGLU and norms are not fused, its first product is kept too, and the norms'
    inputs in float32. LoRA keeps the same inputs, and on a CPU a mask where it drops. With checkpointing every layer
    keeps its input alone, and one layer at a time the rest.
    """
    config, width = base.config, base.dtype.itemsize
    layers, hidden, wide = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    keys = hidden * config.num_key_value_heads // config.num_attention_heads
    on_gpu = base.device.type == "cuda"
    kept = width * (6 * hidden + 2 * keys + 3 * wide)
    if not (on_gpu and kernels.kernels_available()):
        kept += width * wide
    if not on_gpu:
        kept += 4 * 2 * hidden
    trained = 0
    for name, module in base.base_model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in run.lora.target_modules:
            trained += run.lora.r * (module.in_features + module.out_features)
            if run.lora.lora_dropout and not on_gpu:
                kept += module.in_features / layers  # a byte each
    tokens = run.trainer.per_device_train_batch_size * run.trainer.max_length
    activations = tokens * (layers * width * hidden + kept if checkpointing else layers * kept)
    # Weights, gradients and two moments in float32; on a GPU also their part of the stack, its gradients, and a pass's.
    return (28 if on_gpu else 16) * trained + activations + 3 * 4 * LOGITS_CHUNK * config.vocab_size


def free_bytes(device: torch.device) -> float:
    """Memory in bytes that can still be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return psutil.virtual_memory().available


def free_memory() -> None:
    """Give the GPU what nobody holds any more; PyTorch keeps it for itself otherwise."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def needs_checkpointing(run: RunConfig, base: PreTrainedModel) -> bool:
    """Whether activations are recomputed: as configured, or else where keeping them would take most of the memory."""
    if run.trainer.gradient_checkpointing is not None:
        return run.trainer.gradient_checkpointing
    return training_bytes(run, base, False) > 0.8 * free_bytes(base.device)


def tune_malloc() -> None:
    """Let the C library keep the memory that tensors free: on a CPU it otherwise goes back to the system at once, and
    every large tensor is made of pages that must be cleared again, a sixth of the time of a step.

    glibc only (man 3 mallopt); a MALLOC_ variable in the environment says that the user decides.
    """
    if sys.platform != "linux" or torch.cuda.is_available() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)
        mallopt(M_ARENA_MAX, 1)  # packed members take turns: an arena for each would keep as much as all need


GIGABYTE = 1e9
# How activations are recomputed. Dropout has its own keys: nothing random happens that would have to be repeated.
CHECKPOINTING_KWARGS = {"use_reentrant": False, "preserve_rng_state": False}


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
    """Raises `UserError` when the weights alone do not fit into the device's free memory."""
    if device.type == "cuda":
        free_memory()  # what the member before this one left is free too
        free, where = torch.cuda.mem_get_info(device)[0], "on the GPU"
    else:
        free, where = psutil.virtual_memory().available, "in memory"
    needed = weight_bytes(model, quantization)
    if needed > free:
        stored = quantization.type.name if quantization else "full precision"
        advice = "free some, or choose a smaller model" if quantization else "choose quantization=nf4"
        raise UserError(
            f"{model.hub_id} in {stored} needs {needed / GIGABYTE:.1f} GB for its weights alone, and "
            f"{free / GIGABYTE:.1f} GB are free {where}: {advice}"
        )


def reset_peak_memory() -> None:
    """Start measuring anew, so that a member of a sweep does not report the peak of the one before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # only Linux has it (man 5 proc: clear_refs)
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Peak memory of this run in 10^9 bytes: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
