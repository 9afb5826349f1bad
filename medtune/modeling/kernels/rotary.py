"""Rotary positions (RoFormer, arXiv:2104.09864) as Llama has them, in one kernel forward and one backward."""

from typing import Any

import torch
import triton
import triton.language as tl


class Rotary(torch.autograd.Function):
    """Rotates `x` [rows, length, heads, width] by angles whose `cos` and `sin` [1, length, width] have equal halves."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grad_out, cos, sin, -1.0), None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """Returns `x` [rows, length, heads, width], each head rotated by its token's angles; back, if `sign` is -1."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    rows, length, heads, width = x.shape
    sizes = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(width // 2)}
    rotate_block[(rows * length,)](x, out, cos, sin, sign, length, heads, width // 2, **sizes)
    return out


@triton.jit(do_not_specialize=["length"])
def rotate_block(  # type: ignore[no-untyped-def]
    x, out, cos, sin, sign, length, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """Rotates all heads of one token; the two halves of each are the coordinates of the rotation."""
    token = tl.program_id(0)
    column, head = tl.arange(0, HALF), tl.arange(0, HEADS)
    offset = (token.to(tl.int64) * heads + head[:, None]) * 2 * half + column[None, :]
    inside = (head < heads)[:, None] & (column < half)[None, :]
    angle = (token % length) * 2 * half + column
    c = tl.load(cos + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=column < half, other=0.0).to(tl.float32)[None, :] * sign
    first = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + offset + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + offset + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
