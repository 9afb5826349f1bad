"""Memory of the base model and of training: what they will take, what is free, and what was taken."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from medtune.config.enums import Dtype, QuantizationType
from medtune.config.schema import Model, Quantization, RunConfig
from medtune.modeling import kernels
from medtune.modeling.loss import LOGITS_CHUNK
from medtune.runtime.errors import UserError

GIGABYTE = 1e9
# How activations are recomputed. Dropout is seeded by step and layer: no random state has to be restored.
CHECKPOINTING_KWARGS = {"use_reentrant": False, "preserve_rng_state": False}


def weight_bytes(model: Model, quantization: Quantization | None) -> float:
    """Returns the memory of the base model in bytes. Embeddings and head stay in 16 bits; the rest is quantized.

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
        free_memory()  # an earlier member's memory is free too
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


def needs_checkpointing(run: RunConfig, base: PreTrainedModel) -> bool:
    """Returns whether activations are recomputed: as configured; by default where keeping them takes most of the
    memory.
    """
    if run.trainer.gradient_checkpointing is not None:
        return run.trainer.gradient_checkpointing
    return training_bytes(run, base, False) > 0.8 * free_bytes(base.device)


def training_bytes(run: RunConfig, base: PreTrainedModel, checkpointing: bool) -> float:
    """Returns the memory in bytes that one member takes beside the base: adapter, optimizer, activations, logits.

    With checkpointing every layer keeps its input alone, and one layer at a time the rest.
    """
    config, on_gpu = base.config, base.device.type == "cuda"
    layers, kept, trained = config.num_hidden_layers, layer_activation_bytes(base), 0
    for name, module in base.base_model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in run.lora.target_modules:
            trained += run.lora.r * (module.in_features + module.out_features)
            if run.lora.lora_dropout and not on_gpu:
                kept += module.in_features / layers  # the mask has a byte for each element
    tokens = run.trainer.per_device_train_batch_size * run.trainer.max_length
    layer_input = base.dtype.itemsize * config.hidden_size
    activations = tokens * (layers * layer_input + kept if checkpointing else layers * kept)
    # Weights, gradients and two moments in float32; on a GPU also their part of the stack, its gradients, and a pass's.
    return (28 if on_gpu else 16) * trained + activations + 3 * 4 * LOGITS_CHUNK * config.vocab_size


def layer_activation_bytes(base: PreTrainedModel) -> float:
    """Returns the bytes that a token's activations take in one layer, dropout masks left out.

    As in Korthikanti et al. (arXiv:2205.05198, section 4.1), with Llama's widths, and without the attention matrix,
    which fused kernels never store: the inputs of projections, norms and products, in the base's precision. Where
    SwiGLU and norms are not fused, its first product is kept too, and the norms' inputs in float32. LoRA keeps the
    inputs that are kept anyway.
    """
    config, width, on_gpu = base.config, base.dtype.itemsize, base.device.type == "cuda"
    hidden, wide = config.hidden_size, config.intermediate_size
    keys = hidden * config.num_key_value_heads // config.num_attention_heads
    kept = width * (6 * hidden + 2 * keys + 3 * wide)
    if not (on_gpu and kernels.kernels_available()):
        kept += width * wide
    if not on_gpu:
        kept += 4 * 2 * hidden
    return kept


def free_bytes(device: torch.device) -> float:
    """Returns the memory in bytes that is still free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return psutil.virtual_memory().available


class OutOfMemory(Exception):
    """Memory ran out in a pass; the message says which keys take less."""


@contextlib.contextmanager
def explained_memory_errors() -> Iterator[None]:
    """Raises `OutOfMemory` in place of PyTorch's own errors, which name sizes of blocks and none of the keys."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the memory
        raise OutOfMemory(
            f"the memory of the {'GPU' if torch.cuda.is_available() else 'machine'} is full: lower "
            "trainer.per_device_train_batch_size (and raise trainer.gradient_accumulation_steps), trainer.max_length "
            "or eval.batch_size, set trainer.gradient_checkpointing=true, or free the memory that other programs hold"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether memory ran out; only one of PyTorch's ways to say so has an exception of its own."""
    said = str(error)
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in said for word in words)


def free_memory() -> None:
    """Returns unused memory to the GPU; PyTorch keeps it otherwise."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tune_malloc() -> None:
    """Makes the C library keep the memory of freed tensors.

    On a CPU it otherwise returns that memory to the system, which clears every page of the next large tensor. glibc
    only (man 3 mallopt). Does nothing if the user decides by a MALLOC_ variable in the environment.
    """
    decided = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or torch.cuda.is_available() or decided:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)
        mallopt(M_ARENA_MAX, 1)  # lockstep members take turns: an arena for each would keep as much as all need


def reset_peak_memory() -> None:
    """Starts a new peak, so that a member of a sweep does not report the peak of an earlier one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # only Linux has it (man 5 proc: clear_refs)
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Returns the peak memory of this run in 10^9 bytes: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
