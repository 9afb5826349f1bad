"""conf/model + conf/quantization -> the frozen base model, ready for an adapter."""

import logging
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from medtune.config.enums import Attention, Dtype, QuantizationType, Weights
from medtune.config.schema import Model, Quantization
from medtune.modeling.attention import eval_attention
from medtune.modeling.fused_layers import use_fused_layers
from medtune.modeling.memory import GIGABYTE
from medtune.modeling.quantized import cache_dequantized, keep_gradients_after_evaluation, place_8bit_states
from medtune.modeling.weights import random_config, random_weights, resolve_weights, with_hub_errors
from medtune.runtime.errors import UserError

log = logging.getLogger(__name__)

PROBE_TOKENS = 8
PROBE_SCALE = 64.0  # a power of two: no rounding
PROBE_TOLERANCE = 1e-3  # the two products have the same operands; a kernel may sum them in another order


def load_base(
    model: Model, quantization: Quantization | None, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """Loads the base model, quantized and frozen, on `device`.

    Generation stops at any of `model.stop_tokens`. Its name is the hub id, whatever folder it was loaded from.
    Raises `UserError` when the weights cannot be loaded, or the attention kernel is not installed.
    """
    if model.attn_implementation is Attention.flash_attention_2 and not is_flash_attn_2_available():
        raise UserError(
            "model.attn_implementation=flash_attention_2 needs a GPU and the package flash-attn: choose sdpa"
        )
    require_storage(model, quantization)
    dtype = dtype_for(model, device)
    base = load_weights(model, quantization, tokenizer, device, dtype)
    require_embedded(base, model, tokenizer)
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
    cache_dequantized(base)
    use_fused_layers(base)
    require_plain_logits(base)
    return base


def require_storage(model: Model, quantization: Quantization | None) -> None:
    """Raises `UserError` where the weights are stored quantized already, and otherwise than `quantization` says."""
    if model.weights not in (Weights.folder, Weights.hub):
        return
    source = resolve_weights(model)
    config = with_hub_errors(
        model, lambda: AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=False)
    )
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    told: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    if told.get("quant_method") != "bitsandbytes":
        raise UserError(
            f"{model.hub_id} is stored in {told.get('quant_method')}, which medtune does not train on: choose its "
            "weights in 16 bits"
        )
    kind = "int8" if told.get("load_in_8bit") else str(told.get("bnb_4bit_quant_type"))
    double = bool(told.get("bnb_4bit_use_double_quant")) and kind != "int8"
    asked = (quantization.type.name, quantization.double_quantization) if quantization else ("none", False)
    if asked != (kind, double):
        raise UserError(
            f"{model.hub_id} is stored in {kind} already: choose quantization={kind} "
            f"quantization.double_quantization={str(double).lower()}, or its weights in 16 bits"
        )


def require_embedded(base: PreTrainedModel, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` for a token of the configuration that the embedding has no row for."""
    rows = cast(torch.nn.Embedding, base.get_input_embeddings()).num_embeddings
    named = {"pad_token": [model.pad_token], "stop_tokens": model.stop_tokens}
    for key, tokens in named.items():
        for token in tokens:
            if (place := cast(int, tokenizer.convert_tokens_to_ids(token))) >= rows:
                raise UserError(
                    f"model.{key}: {token} is token {place}, and the embedding of {model.hub_id} has {rows}: choose "
                    "another token, or weights whose embedding was made larger for it"
                )


@torch.no_grad()
def require_plain_logits(base: PreTrainedModel) -> None:
    """Raises `UserError` where a model's logits are not the product of its hidden states with its head alone.

    Granite and Cohere scale them, Gemma 2 caps them. Training, evaluation and decoding would take
    a wrong loss. The model's own forward pass is asked for a few tokens, with hidden states so large that a cap shows.
    """
    hidden: list[torch.Tensor] = []

    def enlarge(_: torch.nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * PROBE_SCALE
        hidden.append(output.last_hidden_state)
        return output

    hook = base.base_model.register_forward_hook(enlarge)
    mode = base.training
    base.eval()
    try:
        ids = torch.arange(PROBE_TOKENS, device=base.device)[None]
        own = base(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
        base.train(mode)
    ours = base.get_output_embeddings()(hidden[0]).float()
    if not torch.allclose(own, ours, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE * ours.abs().max().item()):
        raise UserError(
            f"{base.name_or_path} ({type(base).__name__}) scales or caps its logits after the head, and medtune's "
            "loss does not: choose a model of the Llama, Mistral or Qwen architecture"
        )


def load_weights(
    model: Model,
    quantization: Quantization | None,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Returns the base model as transformers loads it: quantized, on `device`."""
    options: dict[str, Any] = {
        "dtype": dtype,
        "quantization_config": quantization_config(quantization, dtype),
        "attn_implementation": eval_attention(model.attn_implementation),
        "device_map": {"": device},
        "trust_remote_code": False,
    }
    if model.weights is Weights.random:
        config = random_config(model, tokenizer)
        weights: Any = random_weights(config, dtype, device)
        return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, **options)
    source = resolve_weights(model)
    return with_hub_errors(
        model, lambda: AutoModelForCausalLM.from_pretrained(source, revision=model.revision, **options)
    )


def device_for(model: Model) -> torch.device:
    """Returns the first GPU, or the CPU. Raises `UserError` for a model that needs a GPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if model.needs_gpu:
        raise UserError(
            f"{model.hub_id} needs an NVIDIA GPU, and PyTorch finds none on this machine: run it where there is one, "
            "or choose a small model, as model=smollm2_135m"
        )
    return torch.device("cpu")


def dtype_for(model: Model, device: torch.device) -> torch.dtype:
    """Returns `model.dtype` as a torch dtype; `auto` is bfloat16, or float16 on a GPU without it.

    Raises `UserError` for float16 on a CPU.
    """
    if model.dtype is Dtype.float16 and device.type == "cpu":
        raise UserError("model.dtype=float16 trains on a GPU only: on a CPU choose bfloat16 or float32")
    if model.dtype is not Dtype.auto:
        return getattr(torch, model.dtype.name)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def require_context(base: PreTrainedModel, max_length: int) -> None:
    """Raises `UserError` when conversations may be longer than the context that the base model was trained for."""
    context = base.config.max_position_embeddings
    if max_length > context:
        raise UserError(
            f"trainer.max_length={max_length} is more than the {context} tokens that {base.name_or_path} reads"
        )


def quantization_config(quantization: Quantization | None, dtype: torch.dtype) -> Any:
    """Returns the `BitsAndBytesConfig` of a quantization (https://huggingface.co/docs/bitsandbytes), or None."""
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
