"""Parts of a frozen Llama on a GPU in one kernel each, where its own code takes many."""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from medtune.modeling import kernels
from medtune.modeling.attention import CAUSAL
from medtune.modeling.forwards import replace_forward


def use_fused_layers(base: PreTrainedModel) -> None:
    """Makes RMSNorm (arXiv:1910.07467), SwiGLU and, in training, rotary positions run in one kernel each way.

    Each rounds once, where Llama's own code rounds after every step.
    """
    if base.device.type != "cuda":
        return
    for module in base.modules():
        if isinstance(module, LlamaRMSNorm):
            replace_forward(module, partial(norm, module), "fused RMSNorm")
        elif isinstance(module, LlamaMLP) and module.config.hidden_act == "silu" and kernels.kernels_available():
            replace_forward(module, partial(feed_forward, module), "fused SwiGLU")
        elif isinstance(module, LlamaAttention) and not module.attention_dropout and kernels.kernels_available():
            replace_forward(module, partial(attend, module), "fused rotary positions")


def norm(layer: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Returns RMSNorm of `x` [rows, length, width] in its type; autocast would make it float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, layer.weight.shape, layer.weight, layer.variance_epsilon)


def feed_forward(layer: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    """Returns the feed-forward part of a Llama layer; `x` and the result: [rows, length, width]."""
    from medtune.modeling.kernels.swiglu import SwiGLU

    product = SwiGLU.apply(layer.gate_proj(x), layer.up_proj(x))
    return cast(torch.Tensor, layer.down_proj(product))


def attend(layer: LlamaAttention, hidden_states: torch.Tensor, **others: Any) -> tuple[torch.Tensor, Any]:
    """Returns the attention of a Llama layer: [rows, length, width]. The stock forward runs unless it is `CAUSAL`."""
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
