"""4-bit weights -> their values, in one launch where bitsandbytes takes three, and equal to the bit."""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

BYTES = 1024  # of a program; each holds two weights


def dequantize_4bit_weight(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Returns the values [out, in] of `packed`, a weight that bitsandbytes holds in 4 bits with its `state`."""
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    packed = packed.view(torch.uint8)
    nested = (state.absmax, state.state2.code, state.state2.absmax, state.offset) if state.nested else None
    scales, scale_code, scale_scales, offset = nested or (state.absmax,) * 4
    group = state.state2.blocksize if state.nested else 1
    dequantize_block[(triton.cdiv(packed.numel(), BYTES),)](
        packed, out, state.code, scales, scale_code, scale_scales, offset, packed.numel(),
        BLOCK=state.blocksize, NESTED=state.nested, GROUP=group, BYTES=BYTES,
        enable_fp_fusion=False,  # bitsandbytes rounds twice
    )  # fmt: skip
    return out


@triton.jit
def dequantize_block(  # type: ignore[no-untyped-def]
    packed, out, code, scales, scale_code, scale_scales, offset, count,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Dequantizes some bytes.

    A block of weights has one scale. With double quantization that is a byte, with a scale for each group of blocks.
    """
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = byte < count
    pair = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    block = byte // (BLOCK // 2)
    if NESTED:
        scale = tl.load(scale_code + tl.load(scales + block, mask=inside, other=0).to(tl.int32))
        scale = scale * tl.load(scale_scales + block // GROUP, mask=inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=inside, other=0.0)
    first, second = tl.load(code + (pair >> 4)) * scale, tl.load(code + (pair & 15)) * scale
    position = tl.program_id(0).to(tl.int64) * BYTES * 2 + tl.arange(0, 2 * BYTES)
    tl.store(out + position, tl.interleave(first, second).to(out.dtype.element_ty), mask=position < 2 * count)
