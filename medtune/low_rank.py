"""What a LoRA layer adds to its frozen product, in as few passes over the activations as it takes.

PEFT's own layer casts the input of each layer to float32, and makes a new tensor for the dropout, the scaling, the sum
and each cast; together a third of a training step on a CPU. Here the arithmetic is that of the frozen product, as under
autocast on a GPU, while weights and gradients stay in float32, and the memory for the backward pass is half as large.
"""

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from medtune.dropout import KeyedDropout


class LowRank(LoraVariant):
    """A variant of PEFT's layer, with the numbers of the stock one."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """The frozen product `result` [..., out] of `x` [..., in], with what the adapter adds to it."""
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        dropout, scale = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        mask = None
        if isinstance(dropout, KeyedDropout) and dropout.training:
            mask, scale = dropout.mask(x), scale / (1 - dropout.p)
        else:
            x = dropout(x)
        return cast(torch.Tensor, Update.apply(result, x, a, b, scale, mask))


class Update(torch.autograd.Function):
    """y + scale * B A x (arXiv:2106.09685, equation 3), in the arithmetic of y.

    `y` [..., out], `x` [..., in], `a` [r, in], `b` [out, r]; `mask` [..., in] is 0 where x is dropped, else 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        x = x.to(y.dtype)
        low = (masked(x, mask).flatten(0, -2) @ a.T.to(y.dtype)).mul_(scale)
        ctx.save_for_backward(x, low, a, b, mask)
        ctx.scale = scale
        return torch.addmm(y.flatten(0, -2), low, b.T.to(y.dtype)).view(y.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a, b, mask = ctx.saved_tensors
        of_y = gradient.flatten(0, -2)
        of_low = (of_y @ b.to(of_y.dtype)).mul_(ctx.scale)
        of_a, of_b = of_low.T @ masked(x, mask).flatten(0, -2), of_y.T @ low
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = masked((of_low @ a.to(of_y.dtype)).view(x.shape), mask)
        return gradient, of_x, of_a.to(a.dtype), of_b.to(b.dtype), None, None


def masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] without what is dropped."""
    return x if mask is None else x * mask.to(x.dtype)  # masked_fill takes twice as long on a CPU


def use_low_rank(model: PeftModel) -> None:
    """Let every LoRA layer that is no variant already (DoRA is one) compute so."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for adapter, weights in layer.lora_A.items():
                if adapter not in layer.lora_variant and isinstance(weights, nn.Linear):
                    layer.lora_variant[adapter] = LowRank()
                    layer.cast_input_dtype_enabled = False
