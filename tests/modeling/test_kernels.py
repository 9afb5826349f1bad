"""The GPU kernels against PyTorch's and bitsandbytes' own. Without a GPU all are skipped."""

import pytest
import torch
import torch.nn.functional as F

from medtune.modeling.kernels import MaskSeeds
from medtune.modeling.lora.dropout import apply_mask, dropout_matmul, dropout_matmul_backward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels run on a GPU")
KEYS, RATES = [1 << 60, 12345], [0.3, 0.05]  # of two members


def seeds_of(layer: int, length: int, members: slice = slice(None)) -> MaskSeeds:
    keys, rates = torch.tensor(KEYS).cuda(), torch.tensor(RATES).cuda()
    return MaskSeeds(keys[members], rates[members], layer, length)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the norm of the difference over the norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("width", [64, 700, 4096])
def test_a_mask_is_the_same_in_company_and_padded(width: int) -> None:
    from medtune.modeling.kernels.dropout import drop

    alone = drop(torch.ones(2, 2 * 5, width).cuda(), seeds_of(77, 5))
    padded = drop(torch.ones(2, 2 * 9, width).cuda(), seeds_of(77, 9))
    assert torch.equal(alone.view(2, 2, 5, width), padded.view(2, 2, 9, width)[:, :, :5])
    assert torch.equal(alone[1:], drop(torch.ones(1, 2 * 5, width).cuda(), seeds_of(77, 5, slice(1, None))))
    assert torch.allclose((alone == 0).float().mean((1, 2)), torch.tensor(RATES).cuda(), atol=0.05)
    assert not torch.equal(alone, drop(torch.ones(2, 2 * 5, width).cuda(), seeds_of(78, 5)))


@pytest.mark.parametrize("rank", [3, 16, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_products_have_the_mask_of_what_is_dropped(dtype: torch.dtype, tolerance: float, rank: int) -> None:
    from medtune.modeling.kernels.dropout import differentiate_dropped, drop, multiply_dropped

    seeds = seeds_of(7, 21)
    for width in (64, 700, 14336):
        shapes = (2, 42, width), (2, rank, width), (2, 42, rank)
        x, a, grad_low = (torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)
        dropped = drop(x, seeds)
        low = multiply_dropped(x, a, seeds)  # one sum over the width, in float32
        assert distance(low, torch.bmm(dropped.double(), a.double().mT)) < max(tolerance, 4e-6)
        kept = drop(torch.ones(2, 42, width, device="cuda"), seeds)
        grad_x, again = differentiate_dropped(grad_low, x, a, seeds)
        assert distance(grad_x, torch.bmm(grad_low.double(), a.double()) * kept) < tolerance
        assert torch.equal(again, dropped)


@pytest.mark.parametrize(("length", "rank"), [(512, 16), (1024, 16), (1024, 65)])
def test_few_and_many_tokens_and_a_large_rank_have_one_mask(length: int, rank: int) -> None:
    seeds = seeds_of(7, length)
    x, a, grad_low = (torch.randn(2, *shape, device="cuda") for shape in ((length, 300), (rank, 300), (length, rank)))
    mask = apply_mask(torch.ones_like(x), seeds)
    assert distance(dropout_matmul(x, a, seeds), torch.bmm(x.double() * mask, a.double().mT)) < 4e-6
    grad_x, dropped = dropout_matmul_backward(grad_low, x, a, seeds)
    assert distance(grad_x, torch.bmm(grad_low.double(), a.double()) * mask) < 1e-6 and torch.equal(dropped, x * mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantized_weights_are_those_of_bitsandbytes_to_the_bit(kind: str, nested: bool, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from medtune.modeling.kernels.dequantize import dequantize_4bit_weight

    for shape in ((192, 576), (3000, 64), (1024, 4096)):
        weight = torch.randn(shape, device="cuda", dtype=dtype)
        packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        assert torch.equal(dequantize_4bit_weight(packed, state), dequantize_4bit(packed, state))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_swiglu_has_the_product_and_the_gradients(dtype: torch.dtype, tolerance: float) -> None:
    from medtune.modeling.kernels.swiglu import SwiGLU

    gate, up, grad_out = (torch.randn(3, 17, 700, device="cuda", dtype=dtype) for _ in range(3))
    exact = [values.double().requires_grad_() for values in (gate, up)]
    expected = F.silu(exact[0]) * exact[1]
    out = SwiGLU.apply(gate.requires_grad_(), up.requires_grad_())
    assert distance(out, expected) < tolerance
    for found, right in zip(
        torch.autograd.grad(out, (gate, up), grad_out),
        torch.autograd.grad(expected, exact, grad_out.double()),
        strict=True,
    ):
        assert distance(found, right) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(("heads", "width"), [(32, 128), (3, 20)])
def test_rotary_positions_are_llamas(heads: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from medtune.modeling.kernels.rotary import Rotary

    x, grad_out = (torch.randn(2, 17, heads, width, device="cuda", dtype=dtype) for _ in range(2))
    angles = torch.randn(1, 17, width // 2, device="cuda").repeat(1, 1, 2)
    exact = x.double().transpose(1, 2).requires_grad_()
    expected, _ = apply_rotary_pos_emb(exact, exact, angles.double().cos(), angles.double().sin())
    out = Rotary.apply(x.requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype))
    assert distance(out, expected.transpose(1, 2)) < tolerance
    slope = torch.autograd.grad(out, x, grad_out)[0]
    right = torch.autograd.grad(expected, exact, grad_out.double().transpose(1, 2))[0].transpose(1, 2)
    assert distance(slope, right) < tolerance


def test_a_replayed_pass_equals_one_that_was_not_captured_to_the_bit() -> None:
    from medtune.modeling.multi_lora.captured import CapturedPasses

    weight = torch.randn(32, 32, device="cuda", requires_grad=True)
    embedding = torch.randn(100, 32, device="cuda")

    def run(ids: torch.Tensor) -> torch.Tensor:
        rows = (embedding[ids] @ weight)[:, None]
        return F.scaled_dot_product_attention(rows, rows, rows, is_causal=True)[:, 0].tanh()

    passes = CapturedPasses(run, [weight], torch.device("cuda"), longest=300)
    for length in (40, 300, 40, 64, 299):
        ids = torch.randint(0, 100, (3, length), device="cuda")
        hidden = passes.forward(ids).clone()
        slope = torch.randn_like(hidden)
        (found,) = passes.backward(slope)
        filled, steep = F.pad(ids, (0, -length % 64)), F.pad(slope, (0, 0, 0, -length % 64))
        output = run(filled)
        expected = torch.autograd.grad(output, weight, steep)[0]
        assert torch.equal(hidden, output[:, :length]) and torch.equal(found, expected)
        del output  # its graph holds the place where the weight's gradient goes, and what stream that is of
    assert len(passes.passes) == 2, "64 and 320 tokens"
