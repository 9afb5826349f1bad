"""Dropout on a GPU in one pass over the activations, without a mask in memory: each element's number is counted, not
drawn (Philox, Salmon et al., SC 2011), so that the backward pass makes the same mask again."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["layer", "per_row"])
def drop_block(x, out, keys, shares, layer, per_row, per_member, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    member = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < per_member
    row = (place // per_row).to(tl.uint32)
    element = (place % per_row).to(tl.uint32)  # of the row: the same whatever the row is padded to
    number, _, _, _ = tl.philox(tl.load(keys + member), element, row, row * 0 + layer, row * 0)
    keep = tl.uint_to_uniform_float(number) >= tl.load(shares + member)
    values = tl.load(x + member * per_member + place, mask=inside)
    tl.store(out + member * per_member + place, tl.where(keep, values, 0.0), mask=inside)


def drop(x: torch.Tensor, keys: torch.Tensor, shares: torch.Tensor, layer: int, length: int) -> torch.Tensor:
    """`x` [members, tokens, width] with a share of its elements zero, chosen by `keys` and `layer`.

    `keys`, `shares`: [members].
    `length`: of a row, in tokens; a member's tokens are those of its rows, one after another.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    per_member = x[0].numel()
    grid = (triton.cdiv(per_member, BLOCK), len(x))
    drop_block[grid](x, out, keys, shares, layer, length * x.shape[-1], per_member, BLOCK=BLOCK)
    return out
