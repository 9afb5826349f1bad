"""Parts of a frozen Llama in one kernel each, on a GPU: where its own code takes many."""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from medtune.modeling import kernels
from medtune.modeling.attention import CAUSAL


def use_fused_layers(base: PreTrainedModel) -> None:
    """Compute RMSNorm (arXiv:1910.07467) and SwiGLU, and in training rotary positions, in one kernel each way.

    Each rounds once, where Llama's own code rounds after every step.
    """
    if base.device.type != "cuda":
        return
    for module in base.modules():
        if isinstance(module, LlamaRMSNorm):
            vars(module)["forward"] = partial(norm, module)
        elif isinstance(module, LlamaMLP) and module.config.hidden_act == "silu" and kernels.kernels_available():
            vars(module)["forward"] = partial(feed_forward, module)
        elif isinstance(module, LlamaAttention) and not module.attention_dropout and kernels.kernels_available():
            vars(module)["forward"] = partial(attend, module)


def norm(layer: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm of `x` [rows, length, width], in its type; autocast would have it in float32, and all that follows."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, layer.weight.shape, layer.weight, layer.variance_epsilon)


def feed_forward(layer: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    """The feed-forward part of a Llama layer; `x` and the result: [rows, length, width]."""
    from medtune.modeling.kernels.swiglu import SwiGLU

    product = SwiGLU.apply(layer.gate_proj(x), layer.up_proj(x))
    return cast(torch.Tensor, layer.down_proj(product))


def attend(layer: LlamaAttention, hidden_states: torch.Tensor, **others: Any) -> tuple[torch.Tensor, Any]:
    """The attention of a Llama layer; `hidden_states` and the result: [rows, length, width]. Stock unless `CAUSAL`."""
    if layer.config._attn_implementation != CAUSAL:
        return LlamaAttention.forward(layer, hidden_states, **others)
    from medtune.modeling.kernels.rotary import Rotary

    rows, length, _ = hidden_states.shape
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    query, key, value = (project(hidden_states).view(rows, length, -1, layer.head_dim) for project in projections)
    turned = [Rotary.apply(part, *others["position_embeddings"]) for part in (query, key)]
    query, key, value = (part.transpose(1, 2) for part in (*turned, value))
    attended, _ = sdpa_attention_forward(layer, query, key, value, None, scaling=layer.scaling)
    return layer.o_proj(attended.reshape(rows, length, -1)), None
