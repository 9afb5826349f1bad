"""Views of the frozen base, and the proof that it did not change."""

import copy
import hashlib
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import PreTrainedModel

from medtune.modeling.quantized import cached_weight, dequantize, four_bit_layers


def share_weights(base: PreTrainedModel) -> PreTrainedModel:
    """A second tree of modules over the same frozen tensors: an adapter attached to it leaves the base as it is."""
    tensors: list[Any] = [*base.parameters(), *base.buffers()]
    for module in base.modules():
        # bitsandbytes keeps what belongs to a weight beside it: constants of 4 bits, and the state of 8.
        if isinstance(module, Linear4bit):
            tensors += [module.quant_state, cached_weight(module)]
        tensors += [v for v in vars(getattr(module, "state", None) or object).values() if isinstance(v, torch.Tensor)]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def fingerprint(base: PreTrainedModel) -> str:
    """sha256 over the name, shape, type and bytes of every frozen tensor: equal means the same base to the bit."""
    digest = hashlib.sha256()
    for name, tensor in base.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def checksums(base: PreTrainedModel) -> list[torch.Tensor]:
    """Sums of the bytes of every frozen tensor, down and across: a changed byte changes two of them.

    For a GPU, where they take no time, and the fingerprint seconds.
    """
    found = []
    for tensor in base.state_dict().values():
        content = tensor.detach().contiguous().view(-1).view(torch.uint8)
        content = content.view(-1, 4096 if len(content) % 4096 == 0 else 1)
        found += [content.sum(side, dtype=torch.int64) for side in (0, 1)]
    return found


def cache_matches(base: PreTrainedModel) -> bool:
    """Whether every 4-bit layer computes with what its weight stands for."""
    held = ((layer, cached_weight(layer)) for layer in four_bit_layers(base))
    return all(weight is None or torch.equal(weight, dequantize(layer)) for layer, weight in held)
