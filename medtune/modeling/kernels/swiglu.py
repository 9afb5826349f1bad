"""SwiGLU's product (arXiv:2002.05202) in one kernel forward and one backward, which keep its two factors alone."""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024  # elements of a program


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, of any shape."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        multiply_block[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        differentiate_block[grid](grad_out.contiguous(), gate, up, grad_gate, grad_up, gate.numel(), BLOCK=BLOCK)
        return grad_gate, grad_up


@triton.jit
def multiply_block(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Computes some elements of the product."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    x = tl.load(gate + offset, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=inside)


@triton.jit
def differentiate_block(  # type: ignore[no-untyped-def]
    grad_out, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr
):
    """Computes some elements of both factors' gradients."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    x = tl.load(gate + offset, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + offset, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad_out + offset, mask=inside, other=0.0).to(tl.float32)
    gated = tl.sigmoid(x)
    grad_x = slope * y * gated * (1 + x * (1 - gated))
    tl.store(grad_gate + offset, grad_x.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + offset, (slope * x * gated).to(grad_up.dtype.element_ty), mask=inside)
