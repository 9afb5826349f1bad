"""Views of the frozen base, and the proof that it did not change."""

import copy
import hashlib
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import PreTrainedModel

from medtune.modeling.quantized import cached_weight, dequantize, four_bit_layers

ROW = 4096  # bytes
PIECE = 2048 * ROW  # bytes that are looked at together


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
        hash_tensor(digest, tensor)
    return digest.hexdigest()


def hash_tensor(digest: Any, tensor: torch.Tensor) -> None:
    """Adds the bytes of a tensor to a hash, piece by piece."""
    for piece in bytes_of(tensor).split(PIECE):
        digest.update(piece.cpu().numpy())


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the content of a tensor as bytes, in its own memory."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def checksums(base: PreTrainedModel) -> list[torch.Tensor]:
    """Returns the sums of the bytes of every frozen tensor, by row and by column: a changed byte changes two of them.

    For a GPU, where the fingerprint takes seconds. The bytes are summed piece by piece, because a sum of bytes takes
    eight times their memory on the way.
    """
    return [part for tensor in base.state_dict().values() for part in sums_of(bytes_of(tensor))]


def sums_of(content: torch.Tensor) -> list[torch.Tensor]:
    """Returns the sums of bytes in rows of `ROW`, those in columns, and the bytes that fill no row."""
    whole = len(content) // ROW * ROW
    rows, columns = [], torch.zeros(ROW, dtype=torch.int64, device=content.device)
    for piece in content[:whole].split(PIECE):
        table = piece.view(-1, ROW)
        rows.append(table.sum(1, dtype=torch.int64))
        columns += table.sum(0, dtype=torch.int64)
    return [*rows, columns, content[whole:].clone()]


def cache_matches(base: PreTrainedModel) -> bool:
    """Returns whether every cached dequantized weight still equals its 4-bit weight, dequantized again."""
    cached = ((layer, cached_weight(layer)) for layer in four_bit_layers(base))
    return all(weight is None or torch.equal(weight, dequantize(layer)) for layer, weight in cached)
