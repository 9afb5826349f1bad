"""Dropout on a GPU in one pass over the activations, without a mask in memory: each element's number is counted, not
drawn (Philox, Salmon et al., SC 2011), so that the backward pass makes the same mask again."""

import torch
import triton
import triton.language as tl

COUNTERS = 256  # of a program; each gives eight numbers of 16 bits


@triton.jit(do_not_specialize=["layer"])
def drop_block(x, out, keys, shares, layer, rows, per_row, COUNTERS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of one row; a row's elements have the same numbers whatever it is padded to."""
    row, member = tl.program_id(1), tl.program_id(2)
    start = (member * rows + row).to(tl.int64) * per_row
    lane = tl.arange(0, COUNTERS)
    counter = (tl.program_id(0) * COUNTERS + lane).to(tl.uint32)
    none = counter * 0
    first, second, third, fourth = tl.philox(tl.load(keys + member), counter, none + row, none + layer, none)
    least = (tl.load(shares + member) * 65536 + 0.5).to(tl.uint32)
    place = tl.program_id(0) * COUNTERS * 8 + lane
    for number in tl.static_range(8):
        four = first if number < 2 else (second if number < 4 else (third if number < 6 else fourth))
        keep = ((four >> (number % 2 * 16)) & 0xFFFF) >= least
        inside = place < per_row
        values = tl.load(x + start + place, mask=inside)
        tl.store(out + start + place, tl.where(keep, values, 0.0), mask=inside)
        place += COUNTERS


def drop(x: torch.Tensor, keys: torch.Tensor, shares: torch.Tensor, layer: int, length: int) -> torch.Tensor:
    """`x` [members, tokens, width] with a share of its elements zero, chosen by `keys` and `layer`.

    `keys` (int64), `shares` (float32, exact to 1/65,536): [members]. `length`: of a row, in tokens; a member's tokens
    are those of its rows, one after another.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    members, tokens, width = x.shape
    rows, per_row = tokens // length, length * width
    grid = (triton.cdiv(per_row, COUNTERS * 8), rows, members)
    drop_block[grid](x, out, keys, shares, layer, rows, per_row, COUNTERS=COUNTERS)
    return out
