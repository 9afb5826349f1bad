"""What LoRA layers add to their frozen product, in as few passes over the activations as it takes.

PEFT's own layer casts the input of each layer to float32, and makes a new tensor for the dropout, the scaling, the sum
and each cast; together a third of a training step on a CPU. Here the arithmetic is that of the frozen product, as under
autocast on a GPU, while weights and gradients stay in float32, and the memory for the backward pass is half as large.
"""

from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from medtune.dropout import KeyedDropout, Keys, Mask, masked


class LowRank(LoraVariant):
    """A variant of PEFT's layer, with the numbers of the stock one."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """The frozen product `result` [rows, length, out] of `x` [rows, length, in], with what the adapter adds."""
        a, b = weights(module, active_adapter)
        dropout, scale = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        mask: Mask = None
        if isinstance(dropout, KeyedDropout) and dropout.training:
            mask, scale = dropout.mask(x), scale / (1 - dropout.p)
        else:
            x = dropout(x)
        return updated(result, x, a[None], b[None], scale, mask)


def weights(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A [r, in] and B [out, r] of a layer."""
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    return cast(nn.Parameter, a.weight), cast(nn.Parameter, b.weight)


def updated(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float | torch.Tensor, mask: Mask
) -> torch.Tensor:
    """The frozen product `y` [rows, length, out] of `x` [rows, length, in], with what each member adds to its rows.

    `a` [members, r, in], `b` [members, out, r]; members' rows follow one another, as many of each. `scale` of all, or
    [members, 1, 1].
    """
    own_y, own_x = (values.reshape(len(a), -1, values.shape[-1]) for values in (y, x))
    dense, keys = (None, mask) if isinstance(mask, Keys) else (mask, None)
    return cast(torch.Tensor, Update.apply(own_y, own_x, a, b, scale, dense, keys)).view(y.shape)


class Update(torch.autograd.Function):
    """y + scale * B A x (arXiv:2106.09685, equation 3) of several members, in the arithmetic of y.

    `y` [members, tokens, out], `x` [members, tokens, in], `a` [members, r, in], `b` [members, out, r]; the mask of x is
    `dense`, or made from `keys`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float | torch.Tensor,
        dense: torch.Tensor | None,
        keys: Keys | None,
    ) -> torch.Tensor:
        x, a, b = x.to(y.dtype), a.to(y.dtype), b.to(y.dtype)
        low = torch.bmm(masked(x, dense if keys is None else keys), a.mT).mul_(scale)
        ctx.save_for_backward(x, low, a, b, dense)
        ctx.scale, ctx.keys = scale, keys
        return torch.baddbmm(y, low, b.mT)

    @staticmethod
    def backward(ctx: Any, of_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a, b, dense = ctx.saved_tensors
        mask = dense if ctx.keys is None else ctx.keys
        of_low = torch.bmm(of_y, b).mul_(ctx.scale)
        of_a, of_b = torch.bmm(of_low.mT, masked(x, mask)), torch.bmm(of_y.mT, low)
        of_x = masked(torch.bmm(of_low, a), mask) if ctx.needs_input_grad[1] else None
        return of_y, of_x, of_a.float(), of_b.float(), None, None, None


def use_low_rank(model: PeftModel) -> None:
    """Let every LoRA layer that is no variant already (DoRA is one) compute so."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for adapter, own in layer.lora_A.items():
                if adapter not in layer.lora_variant and isinstance(own, nn.Linear):
                    layer.lora_variant[adapter] = LowRank()
                    layer.cast_input_dtype_enabled = False
            vars(layer)["forward"] = partial(forward, layer)


def forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What PEFT's layer does with one plain adapter, without its questions and its copy of the frozen product: on a GPU
    they take longer than the arithmetic."""
    active = layer.active_adapters
    variant = layer.lora_variant.get(active[0]) if len(active) == 1 else None
    if args or kwargs or layer.disable_adapters or layer.merged or not isinstance(variant, LowRank):
        return cast(torch.Tensor, type(layer).forward(layer, x, *args, **kwargs))
    return LowRank.forward(layer, active[0], x, layer.base_layer(x))
