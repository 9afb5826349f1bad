"""Dropout on a GPU without a mask in memory: a kernel computes each element's random number from its position.

The generator is Philox (Salmon et al., SC 2011), which counts and has no state: all kernels make the same mask.
"""

import torch
import triton
import triton.language as tl

from medtune.modeling.kernels import MaskSeeds

LANES = 256  # columns a counter apart; each counter gives eight numbers of 16 bits, for columns LANES apart
ROUNDS: tl.constexpr = tl.constexpr(7)  # as many as pass the statistical tests of the paper
TOKENS = 16  # of a tile that is written: the least that a matrix unit takes
READ = 32  # tokens of a tile that is read: as fast as any on an H200 from `MIN_TOKENS` on
MAX_RANK = 64  # that one tile holds
MIN_TOKENS = 2048  # from which a GPU has enough to do if each tile is multiplied by one program


def drop(x: torch.Tensor, seeds: MaskSeeds) -> torch.Tensor:
    """Returns `x` [members, tokens, width] with zeros where the mask drops.

    A member's tokens are those of its rows of `seeds.length`, one after another.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    members, tokens, width = x.shape
    rows = tokens // seeds.length
    grid = (seeds.length * triton.cdiv(width, 8 * LANES), rows, members)
    drop_block[grid](x, out, seeds.keys, seeds.rates, seeds.layer, rows, seeds.length, width, LANES=LANES)
    return out


def multiply_dropped(x: torch.Tensor, a: torch.Tensor, seeds: MaskSeeds) -> torch.Tensor:
    """Returns the product [members, tokens, r] of `drop(x)`, with `x` [members, tokens, width], and `a` [members, r,
    width] transposed. r is at most `MAX_RANK`."""
    x, a = x.contiguous(), a.contiguous()
    members, tokens, width = x.shape
    rank, rows = a.shape[1], tokens // seeds.length
    out = x.new_empty(members, tokens, rank)
    padded = max(16, triton.next_power_of_2(rank))
    # As many columns at a time, and two stages: three take 102,400 bytes of shared memory, of which GPUs of compute
    # capability 8.6, 8.9 and 12.0 have 101,376 (CUDA C++ programming guide, technical specifications).
    step = max(16, 2048 // (padded * x.itemsize))
    sizes = {"RANK": padded, "TOKENS": READ, "LANES": LANES, "STEP": step, "num_stages": 2}
    grid = (triton.cdiv(seeds.length, READ), rows, members)
    multiply_tile[grid](
        x, a, out, seeds.keys, seeds.rates, seeds.layer, rows, seeds.length, width, rank, **sizes
    )  # fmt: skip
    return out


def differentiate_dropped(
    grad_low: torch.Tensor, x: torch.Tensor, a: torch.Tensor, seeds: MaskSeeds
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of `x` [members, tokens, width] from that of `multiply_dropped`'s result, `grad_low`
    [members, tokens, r]; and `drop(x)`, because the mask is at hand."""
    grad_low, x, a = grad_low.contiguous(), x.contiguous(), a.contiguous()
    members, tokens, width = x.shape
    rank, rows = a.shape[1], tokens // seeds.length
    grad_x, dropped = torch.empty_like(x), torch.empty_like(x)
    grid = (triton.cdiv(seeds.length, TOKENS) * triton.cdiv(width, 8 * LANES), rows, members)
    sizes = {"RANK": max(16, triton.next_power_of_2(rank)), "TOKENS": TOKENS, "LANES": LANES}
    differentiate_tile[grid](
        grad_low, x, a, grad_x, dropped, seeds.keys, seeds.rates, seeds.layer, rows, seeds.length, width, rank, **sizes
    )  # fmt: skip
    return grad_x, dropped


@triton.jit
def random_numbers(keys, member, row, layer, counter):  # type: ignore[no-untyped-def]
    """Returns four numbers of 32 bits for each counter of a member's row."""
    zero = counter * 0
    return tl.philox(tl.load(keys + member), counter, zero + row, zero + layer, zero, n_rounds=ROUNDS)


@triton.jit
def is_kept(first, second, third, fourth, number: tl.constexpr, threshold):  # type: ignore[no-untyped-def]
    """Returns whether one of the eight columns of each counter stays."""
    four = first if number < 2 else (second if number < 4 else (third if number < 6 else fourth))
    return ((four >> (number % 2 * 16)) & 0xFFFF) >= threshold


@triton.jit(do_not_specialize=["layer", "rows", "length"])
def drop_block(x, out, keys, rates, layer, rows, length, width, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Masks some columns of one token; a row's elements have the same numbers whatever it is padded to."""
    row, member, chunks = tl.program_id(1), tl.program_id(2), tl.cdiv(width, 8 * LANES)
    token, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane = tl.arange(0, LANES)
    counter = (tl.program_id(0) * LANES + lane).to(tl.uint32)
    first, second, third, fourth = random_numbers(keys, member, row, layer, counter)
    threshold = (tl.load(rates + member) * 65536 + 0.5).to(tl.uint32)
    start = ((member * rows + row).to(tl.int64) * length + token) * width
    for number in tl.static_range(8):
        column = (chunk * 8 + number) * LANES + lane
        inside = column < width
        values = tl.load(x + start + column, mask=inside)
        kept = is_kept(first, second, third, fourth, number, threshold)
        tl.store(out + start + column, tl.where(kept, values, 0.0), mask=inside)


@triton.jit(do_not_specialize=["layer", "rows", "length"])
def multiply_tile(  # type: ignore[no-untyped-def]
    x, a, out, keys, rates, layer, rows, length, width, rank,
    RANK: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Computes all products of a few tokens of a row."""
    row, member, chunks = tl.program_id(1), tl.program_id(2), tl.cdiv(width, 8 * LANES)
    token, r = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK)
    within = token < length
    threshold = (tl.load(rates + member) * 65536 + 0.5).to(tl.uint32)
    start = (member * rows + row).to(tl.int64) * length + token
    total = tl.zeros([TOKENS, RANK], tl.float32)
    for part in range(chunks * (LANES // STEP)):
        chunk = part // (LANES // STEP)
        lane = part % (LANES // STEP) * STEP + tl.arange(0, STEP)
        counter = ((token * chunks + chunk)[:, None] * LANES + lane[None, :]).to(tl.uint32)
        first, second, third, fourth = random_numbers(keys, member, row, layer, counter)
        for number in tl.static_range(8):
            column = (chunk * 8 + number) * LANES + lane
            inside = within[:, None] & (column < width)[None, :]
            values = tl.load(x + start[:, None] * width + column[None, :], mask=inside, other=0.0)
            values = tl.where(is_kept(first, second, third, fourth, number, threshold), values, 0.0)
            offset = (member * rank + r).to(tl.int64)[None, :] * width + column[:, None]
            right = tl.load(a + offset, mask=(r < rank)[None, :] & (column < width)[:, None], other=0.0)
            total = tl.dot(values, right, total, input_precision="ieee")
    offset = out + start[:, None] * rank + r[None, :]
    tl.store(offset, total.to(out.dtype.element_ty), mask=within[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["layer", "rows", "length"])
def differentiate_tile(  # type: ignore[no-untyped-def]
    grad_low, x, a, grad_x, dropped, keys, rates, layer, rows, length, width, rank,
    RANK: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Computes the gradient in some columns of a few tokens of a row, and masks the tokens themselves there."""
    row, member, chunks = tl.program_id(1), tl.program_id(2), tl.cdiv(width, 8 * LANES)
    tile, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane, r = tl.arange(0, LANES), tl.arange(0, RANK)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    within = token < length
    counter = ((token * chunks + chunk)[:, None] * LANES + lane[None, :]).to(tl.uint32)
    first, second, third, fourth = random_numbers(keys, member, row, layer, counter)
    threshold = (tl.load(rates + member) * 65536 + 0.5).to(tl.uint32)
    start = (member * rows + row).to(tl.int64) * length + token
    offset = grad_low + start[:, None] * rank + r[None, :]
    left = tl.load(offset, mask=within[:, None] & (r < rank)[None, :], other=0.0)
    for number in tl.static_range(8):
        column = (chunk * 8 + number) * LANES + lane
        in_row = column < width
        weight = a + (member * rank + r).to(tl.int64)[:, None] * width + column[None, :]
        right = tl.load(weight, mask=(r < rank)[:, None] & in_row[None, :], other=0.0)
        product = tl.dot(left, right, input_precision="ieee")
        offset, inside = start[:, None] * width + column[None, :], within[:, None] & in_row[None, :]
        kept = is_kept(first, second, third, fourth, number, threshold)
        tl.store(grad_x + offset, tl.where(kept, product, 0.0).to(grad_x.dtype.element_ty), mask=inside)
        tl.store(dropped + offset, tl.where(kept, tl.load(x + offset, mask=inside), 0.0), mask=inside)
