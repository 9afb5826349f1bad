"""Dropout on a GPU without a mask in memory: each element's number is counted, not drawn (Philox, Salmon et al.,
SC 2011), so that every kernel that needs the mask makes the same."""

import torch
import triton
import triton.language as tl

LANES = 256  # columns a counter apart; each counter gives eight numbers of 16 bits, for columns LANES apart
ROUNDS: tl.constexpr = tl.constexpr(7)  # as many as pass the statistical tests of the paper
TOKENS = 16  # of a tile: the least that a matrix unit takes
MOST = 64  # rank that one tile holds


@triton.jit
def numbers(keys, member, row, layer, counter):  # type: ignore[no-untyped-def]
    """Four numbers of 32 bits for each counter of a member's row."""
    none = counter * 0
    return tl.philox(tl.load(keys + member), counter, none + row, none + layer, none, n_rounds=ROUNDS)


@triton.jit
def kept(first, second, third, fourth, number: tl.constexpr, least):  # type: ignore[no-untyped-def]
    """Whether one of the eight columns of each counter stays."""
    four = first if number < 2 else (second if number < 4 else (third if number < 6 else fourth))
    return ((four >> (number % 2 * 16)) & 0xFFFF) >= least


@triton.jit(do_not_specialize=["layer", "rows", "length"])
def drop_block(x, out, keys, shares, layer, rows, length, width, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some columns of one token; a row's elements have the same numbers whatever it is padded to."""
    row, member, chunks = tl.program_id(1), tl.program_id(2), tl.cdiv(width, 8 * LANES)
    token, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane = tl.arange(0, LANES)
    counter = (tl.program_id(0) * LANES + lane).to(tl.uint32)
    first, second, third, fourth = numbers(keys, member, row, layer, counter)
    least = (tl.load(shares + member) * 65536 + 0.5).to(tl.uint32)
    start = ((member * rows + row).to(tl.int64) * length + token) * width
    for number in tl.static_range(8):
        column = (chunk * 8 + number) * LANES + lane
        inside = column < width
        values = tl.load(x + start + column, mask=inside)
        keep = kept(first, second, third, fourth, number, least)
        tl.store(out + start + column, tl.where(keep, values, 0.0), mask=inside)


@triton.jit(do_not_specialize=["layer", "rows", "length"])
def add_tile(  # type: ignore[no-untyped-def]
    to, low, a, keys, shares, layer, rows, length, width, rank, RANK: tl.constexpr, TOKENS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Some columns of a few tokens of a row."""
    row, member, chunks = tl.program_id(1), tl.program_id(2), tl.cdiv(width, 8 * LANES)
    tile, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane, r = tl.arange(0, LANES), tl.arange(0, RANK)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    counter = ((token * chunks + chunk)[:, None] * LANES + lane[None, :]).to(tl.uint32)
    first, second, third, fourth = numbers(keys, member, row, layer, counter)
    least = (tl.load(shares + member) * 65536 + 0.5).to(tl.uint32)
    token = (member * rows + row).to(tl.int64) * length + tl.where(token < length, token, length)
    within = tile * TOKENS + tl.arange(0, TOKENS) < length
    left = tl.load(low + token[:, None] * rank + r[None, :], mask=within[:, None] & (r < rank)[None, :], other=0.0)
    for number in tl.static_range(8):
        column = (chunk * 8 + number) * LANES + lane
        inside = column < width
        right = tl.load(
            a + (member * rank + r).to(tl.int64)[:, None] * width + column[None, :],
            mask=(r < rank)[:, None] & inside[None, :],
            other=0.0,
        )
        product = tl.dot(left, right, input_precision="ieee")
        place, there = to + token[:, None] * width + column[None, :], within[:, None] & inside[None, :]
        keep = kept(first, second, third, fourth, number, least)
        tl.store(place, tl.load(place, mask=there) + tl.where(keep, product, 0.0), mask=there)


def drop(x: torch.Tensor, keys: torch.Tensor, shares: torch.Tensor, layer: int, length: int) -> torch.Tensor:
    """`x` [members, tokens, width] with a share of its elements zero, chosen by `keys` and `layer`.

    `keys` (int64), `shares` (float32, exact to 1/65,536): [members]. `length`: of a row, in tokens; a member's tokens
    are those of its rows, one after another.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    members, tokens, width = x.shape
    rows = tokens // length
    grid = (length * triton.cdiv(width, 8 * LANES), rows, members)
    drop_block[grid](x, out, keys, shares, layer, rows, length, width, LANES=LANES)
    return out


def add_dropped(
    to: torch.Tensor, low: torch.Tensor, a: torch.Tensor, keys: torch.Tensor, shares: torch.Tensor, layer: int,
    length: int,
) -> None:  # fmt: skip
    """Add to `to` [members, tokens, width], in place, the product of `low` [members, tokens, r] and `a` [members, r,
    width], without the elements that `drop` takes from a tensor of that shape. r: at most `MOST`."""
    members, tokens, width = to.shape
    rows, rank = tokens // length, low.shape[-1]
    grid = (triton.cdiv(length, TOKENS) * triton.cdiv(width, 8 * LANES), rows, members)
    sizes = {"RANK": max(16, triton.next_power_of_2(rank)), "TOKENS": TOKENS, "LANES": LANES}
    low, a = low.contiguous(), a.contiguous()
    add_tile[grid](to, low, a, keys, shares, layer, rows, length, width, rank, **sizes)
