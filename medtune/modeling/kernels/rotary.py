"""Rotary positions (RoFormer, arXiv:2104.09864) as Llama has them, in one pass forward and one backward."""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length"])
def rotate_block(  # type: ignore[no-untyped-def]
    x, out, cos, sin, sign, length, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """All heads of one token: the first half of each and the second are the two coordinates that turn."""
    token = tl.program_id(0)
    column, head = tl.arange(0, HALF), tl.arange(0, HEADS)
    place = (token.to(tl.int64) * heads + head[:, None]) * 2 * half + column[None, :]
    inside = (head < heads)[:, None] & (column < half)[None, :]
    angle = (token % length) * 2 * half + column
    c = tl.load(cos + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=column < half, other=0.0).to(tl.float32)[None, :] * sign
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """`x` [rows, length, heads, width], each head turned by the angles of its token, or back by a `sign` of -1."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    rows, length, heads, width = x.shape
    sizes = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(width // 2)}
    rotate_block[(rows * length,)](x, out, cos, sin, sign, length, heads, width // 2, **sizes)
    return out


class Rotary(torch.autograd.Function):
    """`x` [rows, length, heads, width], turned by angles whose `cos` and `sin` [1, length, width] have equal halves."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, of_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(of_out, cos, sin, -1.0), None, None
