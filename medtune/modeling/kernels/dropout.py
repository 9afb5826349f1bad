"""Dropout on a GPU without a mask in memory: each element's number is counted, not drawn (Philox, Salmon et al.,
SC 2011), so that every kernel that needs the mask makes the same."""

import torch
import triton
import triton.language as tl

LANES = 256  # columns a counter apart; each counter gives eight numbers of 16 bits, for columns LANES apart
ROUNDS: tl.constexpr = tl.constexpr(7)  # as many as pass the statistical tests of the paper
TOKENS = 16  # of a tile that is written: the least that a matrix unit takes
READ = 32  # tokens of a tile that is read: as fast as any on an H200 from `MANY` on
MOST = 64  # rank that one tile holds
MANY = 2048  # tokens from which a GPU has enough to do if each tile is multiplied by one program


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
def multiply_tile(  # type: ignore[no-untyped-def]
    x, a, out, keys, shares, layer, rows, length, width, rank,
    RANK: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """All products of a few tokens of a row."""
    row, member, chunks = tl.program_id(1), tl.program_id(2), tl.cdiv(width, 8 * LANES)
    token, r = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK)
    within = token < length
    least = (tl.load(shares + member) * 65536 + 0.5).to(tl.uint32)
    start = (member * rows + row).to(tl.int64) * length + token
    total = tl.zeros([TOKENS, RANK], tl.float32)
    for part in range(chunks * (LANES // STEP)):
        chunk = part // (LANES // STEP)
        lane = part % (LANES // STEP) * STEP + tl.arange(0, STEP)
        counter = ((token * chunks + chunk)[:, None] * LANES + lane[None, :]).to(tl.uint32)
        first, second, third, fourth = numbers(keys, member, row, layer, counter)
        for number in tl.static_range(8):
            column = (chunk * 8 + number) * LANES + lane
            there = within[:, None] & (column < width)[None, :]
            values = tl.load(x + start[:, None] * width + column[None, :], mask=there, other=0.0)
            values = tl.where(kept(first, second, third, fourth, number, least), values, 0.0)
            place = (member * rank + r).to(tl.int64)[None, :] * width + column[:, None]
            right = tl.load(a + place, mask=(r < rank)[None, :] & (column < width)[:, None], other=0.0)
            total = tl.dot(values, right, total, input_precision="ieee")
    place = out + start[:, None] * rank + r[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=within[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["layer", "rows", "length"])
def differentiate_tile(  # type: ignore[no-untyped-def]
    of_low, x, a, of_x, dropped, keys, shares, layer, rows, length, width, rank,
    RANK: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The gradient in some columns of a few tokens of a row, and the tokens themselves there."""
    row, member, chunks = tl.program_id(1), tl.program_id(2), tl.cdiv(width, 8 * LANES)
    tile, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane, r = tl.arange(0, LANES), tl.arange(0, RANK)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    within = token < length
    counter = ((token * chunks + chunk)[:, None] * LANES + lane[None, :]).to(tl.uint32)
    first, second, third, fourth = numbers(keys, member, row, layer, counter)
    least = (tl.load(shares + member) * 65536 + 0.5).to(tl.uint32)
    start = (member * rows + row).to(tl.int64) * length + token
    place = of_low + start[:, None] * rank + r[None, :]
    left = tl.load(place, mask=within[:, None] & (r < rank)[None, :], other=0.0)
    for number in tl.static_range(8):
        column = (chunk * 8 + number) * LANES + lane
        inside = column < width
        weight = a + (member * rank + r).to(tl.int64)[:, None] * width + column[None, :]
        right = tl.load(weight, mask=(r < rank)[:, None] & inside[None, :], other=0.0)
        product = tl.dot(left, right, input_precision="ieee")
        place, there = start[:, None] * width + column[None, :], within[:, None] & inside[None, :]
        keep = kept(first, second, third, fourth, number, least)
        tl.store(of_x + place, tl.where(keep, product, 0.0).to(of_x.dtype.element_ty), mask=there)
        tl.store(dropped + place, tl.where(keep, tl.load(x + place, mask=there), 0.0), mask=there)


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


def multiply_dropped(
    x: torch.Tensor, a: torch.Tensor, keys: torch.Tensor, shares: torch.Tensor, layer: int, length: int
) -> torch.Tensor:
    """The product [members, tokens, r] of what `drop` makes of `x` [members, tokens, width], and `a` [members, r,
    width] transposed. r: at most `MOST`."""
    x, a = x.contiguous(), a.contiguous()
    members, tokens, width = x.shape
    rank, rows = a.shape[1], tokens // length
    out = x.new_empty(members, tokens, rank)
    padded = max(16, triton.next_power_of_2(rank))
    # So many columns at a time, and no more stages: three take 102,400 bytes of shared memory, of which GPUs of compute
    # capability 8.6, 8.9 and 12.0 have 101,376.
    step = max(16, 2048 // (padded * x.itemsize))
    sizes = {"RANK": padded, "TOKENS": READ, "LANES": LANES, "STEP": step, "num_stages": 2}
    grid = (triton.cdiv(length, READ), rows, members)
    multiply_tile[grid](x, a, out, keys, shares, layer, rows, length, width, rank, **sizes)
    return out


def differentiate_dropped(
    of_low: torch.Tensor, x: torch.Tensor, a: torch.Tensor, keys: torch.Tensor, shares: torch.Tensor, layer: int,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What `multiply_dropped` adds to the gradient of `x` [members, tokens, width], from that of its result, `of_low`
    [members, tokens, r]; and, as the mask is known, what `drop` makes of `x`."""
    of_low, x, a = of_low.contiguous(), x.contiguous(), a.contiguous()
    members, tokens, width = x.shape
    rank, rows = a.shape[1], tokens // length
    of_x, dropped = torch.empty_like(x), torch.empty_like(x)
    grid = (triton.cdiv(length, TOKENS) * triton.cdiv(width, 8 * LANES), rows, members)
    sizes = {"RANK": max(16, triton.next_power_of_2(rank)), "TOKENS": TOKENS, "LANES": LANES}
    differentiate_tile[grid](of_low, x, a, of_x, dropped, keys, shares, layer, rows, length, width, rank, **sizes)
    return of_x, dropped
