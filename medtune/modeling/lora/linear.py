"""A frozen product plus what LoRA layers add, in as few passes over the activations as possible.

PEFT's own layer casts its input to float32, and makes a new tensor for the dropout, the scaling, the sum and each cast.
Here the arithmetic is that of the frozen product, as under autocast on a GPU; weights and gradients stay in float32.
Sums are made in place, and the backward pass needs half the memory.
"""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from medtune.modeling.forwards import replace_forward
from medtune.modeling.kernels import MaskSeeds
from medtune.modeling.lora.dropout import KeyedDropout, Mask, apply_mask, dropout_matmul, dropout_matmul_backward
from medtune.modeling.quantized import FrozenLinear, frozen_linear


class FusedLora(LoraVariant):
    """A variant of PEFT's LoRA layer that computes the numbers of the stock one."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """Returns the frozen product `result` [rows, length, out] of `x` [rows, length, in] with the adapter's part."""
        return lora_linear(precomputed(result), x, *member(module, active_adapter, x))


def precomputed(result: torch.Tensor) -> FrozenLinear:
    """Returns a frozen layer whose output is known already."""
    return FrozenLinear(lambda _: result, None, None)


def member(
    layer: LoraLayer, adapter: str, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float | torch.Tensor, Mask]:
    """Returns what `lora_linear` needs of a layer that acts alone on `x` [rows, length, in]: A, B, scale and mask."""
    a, b = weights(layer, adapter)
    dropout, scale = layer.lora_dropout[adapter], layer.scaling[adapter]
    if isinstance(dropout, KeyedDropout) and dropout.training:
        return a[None], b[None], scale / (1 - dropout.p), dropout.mask(x)
    assert not (isinstance(dropout, nn.Dropout) and dropout.training), "a stock mask cannot be regenerated"
    return a[None], b[None], scale, None


def weights(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns A [r, in] and B [out, r] of a layer."""
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    return cast(nn.Parameter, a.weight), cast(nn.Parameter, b.weight)


def lora_linear(
    product: FrozenLinear, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float | torch.Tensor, mask: Mask
) -> torch.Tensor:
    """Returns the frozen product [rows, length, out] of `x` [rows, length, in], with each member's part on its rows.

    `a` [members, r, in], `b` [members, out, r]; members' rows follow one another, as many of each. `scale`: of all, or
    [members, 1, 1].
    """
    by_member = len(a), -1, x.shape[-1]
    y = None
    if product.weight is None or not torch.is_grad_enabled():  # for few tokens bitsandbytes has a kernel of its own
        y = product.forward(x)
        y = y.reshape(len(a), -1, y.shape[-1])
    dense, seeds = (None, mask) if isinstance(mask, MaskSeeds) else (mask, None)
    result = LoraFunction.apply(x.reshape(by_member), y, a, b, scale, dense, seeds, product)
    return cast(torch.Tensor, result).view(*x.shape[:-1], -1)


class LoraFunction(torch.autograd.Function):
    """W x + scale * B A x (arXiv:2106.09685, equation 3) of several members, in the arithmetic of W x.

    `x` [members, tokens, in], `a` [members, r, in], `b` [members, out, r]. W x is `y` [members, tokens, out]; without
    it, it is computed from the product's weight. The mask of x is the tensor `dense`, or that of `seeds`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float | torch.Tensor,
        dense: torch.Tensor | None,
        seeds: MaskSeeds | None,
        product: FrozenLinear,
    ) -> torch.Tensor:
        ctx.type_of_x, ctx.weight = x.dtype, product.weight if y is None else None
        with torch.autocast(x.device.type, enabled=False):  # it would change the types of some products only
            if y is None:
                weight = cast(Any, product.weight)()
                x = x.to(weight.dtype)
                y = F.linear(x, weight, product.bias)
            else:
                x, y = x.to(y.dtype), y.clone()
            a, b = a.to(y.dtype), b.to(y.dtype)
            low = dropout_matmul(x, a, dense if seeds is None else seeds).mul_(scale)
            ctx.save_for_backward(x, low, a, b, dense)
            ctx.scale, ctx.seeds = scale, seeds
            # After the product is rounded, as in the stock layer: a sum that is rounded once has other losses.
            return y.baddbmm_(low, b.mT)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a, b, dense = ctx.saved_tensors
        mask = dense if ctx.seeds is None else ctx.seeds
        grad_low = torch.bmm(grad_y, b).mul_(ctx.scale)
        grad_b, grad_x = torch.bmm(grad_y.mT, low), None
        if ctx.needs_input_grad[0]:
            grad_x, x = dropout_matmul_backward(grad_low, x, a, mask)
            # The large product comes last and adds in place: another pass over its result would take longer.
            if ctx.weight is not None:
                grad_x.view(-1, x.shape[-1]).addmm_(grad_y.reshape(-1, grad_y.shape[-1]), ctx.weight())
            grad_x = grad_x.to(ctx.type_of_x)
        else:
            x = apply_mask(x, mask)
        grad_a = torch.bmm(grad_low.mT, x)
        grad_product = grad_y if ctx.needs_input_grad[1] else None
        return grad_x, grad_product, grad_a.float(), grad_b.float(), None, None, None, None


def use_fused_lora(model: PeftModel) -> None:
    """Makes every plain LoRA layer compute this way. A layer of another variant, such as DoRA, stays as it is."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for adapter, own in layer.lora_A.items():
                if adapter not in layer.lora_variant and isinstance(own, nn.Linear):
                    layer.lora_variant[adapter] = FusedLora()
                    layer.cast_input_dtype_enabled = False
            replace_forward(layer, partial(fused_lora_forward, layer), "fused LoRA")


def fused_lora_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Does what PEFT's layer does with one plain adapter, without its checks and its copy of the frozen product.

    On a GPU those take longer than the arithmetic.
    """
    active = layer.active_adapters
    variant = layer.lora_variant.get(active[0]) if len(active) == 1 else None
    if args or kwargs or layer.disable_adapters or layer.merged or not isinstance(variant, FusedLora):
        return cast(torch.Tensor, type(layer).forward(layer, x, *args, **kwargs))
    return lora_linear(frozen_linear(layer.base_layer), x, *member(layer, active[0], x))
