"""Views of the frozen base, and the proof that it did not change."""

import copy
import hashlib
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import PreTrainedModel

from medtune.modeling.quantized import cached_weight, dequantize, four_bit_layers


def share_weights(base: PreTrainedModel) -> PreTrainedModel:
    """Returns a second tree of modules over the same frozen tensors; an adapter on it leaves the base as it is."""
    tensors: list[Any] = [*base.parameters(), *base.buffers()]
    for module in base.modules():
        # bitsandbytes keeps tensors beside a weight: the constants of 4 bits, the state of 8.
        if isinstance(module, Linear4bit):
            tensors += [module.quant_state, cached_weight(module)]
        state = vars(getattr(module, "state", None) or object)
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def fingerprint(base: PreTrainedModel) -> str:
    """Returns a sha256 over name, shape, type and bytes of every frozen tensor: equal means equal to the bit."""
    digest = hashlib.sha256()
    for name, tensor in base.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def checksums(base: PreTrainedModel) -> list[torch.Tensor]:
    """Returns the sums of the bytes of every frozen tensor, by row and by column: a changed byte changes two of them.

    For a GPU, where the fingerprint takes seconds.
    """
    sums = []
    for tensor in base.state_dict().values():
        content = tensor.detach().contiguous().view(-1).view(torch.uint8)
        content = content.view(-1, 4096 if len(content) % 4096 == 0 else 1)
        sums += [content.sum(side, dtype=torch.int64) for side in (0, 1)]
    return sums


def cache_matches(base: PreTrainedModel) -> bool:
    """Returns whether every cached dequantized weight still equals its 4-bit weight, dequantized again."""
    cached = ((layer, cached_weight(layer)) for layer in four_bit_layers(base))
    return all(weight is None or torch.equal(weight, dequantize(layer)) for layer, weight in cached)
