"""SwiGLU's product (arXiv:2002.05202) in one pass forward and one backward; only its two factors are kept for it."""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def multiply_block(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Forward."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=inside)


@triton.jit
def differentiate_block(of_out, gate, up, of_gate, of_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Backward."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(of_out + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(x)
    tl.store(of_gate + place, (slope * y * share * (1 + x * (1 - share))).to(of_gate.dtype.element_ty), mask=inside)
    tl.store(of_up + place, (slope * x * share).to(of_up.dtype.element_ty), mask=inside)


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
    def backward(ctx: Any, of_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        differentiate_block[grid](of_out.contiguous(), gate, up, of_gate, of_up, gate.numel(), BLOCK=BLOCK)
        return of_gate, of_up
