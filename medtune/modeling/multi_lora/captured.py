"""A pass through the base model as two CUDA graphs: captured once for each shape of its rows, then replayed."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from medtune.modeling import cuda_graphs as graphs

log = logging.getLogger(__name__)

MIN_CAPTURE_LENGTH = 64  # tokens: shorter rows are padded to it

Shape = tuple[int, int]  # rows, and their length in tokens


def bucket(length: int) -> int:
    """Returns the length in tokens to which rows of `length` are padded: few lengths, at most an eighth longer."""
    step = max(MIN_CAPTURE_LENGTH, 2 ** (length - 1).bit_length() // 16)
    return -(-length // step) * step


@dataclass
class CapturedPass:
    """The pass of one shape. Its graphs read and write these tensors at their addresses.

    `ids` [rows, length]: the input. `hidden` and `grad_hidden` [rows, length, width]: the output, and its gradient.
    """

    ids: torch.Tensor
    hidden: torch.Tensor
    grad_hidden: torch.Tensor
    replay_forward: Callable[[], None]
    replay_backward: Callable[[], None]


class CapturedPasses:
    """The captured passes of one set of adapters. All share their memory: a pass ends before the next one begins.

    `run`: returns hidden states [rows, length, width] of token ids [rows, length]; a function of `parameters` too.
    `longest`: the most tokens that a row may have.
    """

    def __init__(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        parameters: Sequence[torch.Tensor],
        device: torch.device,
        longest: int,
    ) -> None:
        self.run, self.parameters, self.device, self.longest = run, parameters, device, longest
        self.gradients = [torch.zeros_like(parameter) for parameter in parameters]
        self.passes: dict[Shape, CapturedPass] = {}
        self.latest: CapturedPass | None = None
        self.hidden = self.grad_hidden = torch.empty(0, device=device)
        self.pool: Any = None
        self.told = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns hidden states [rows, length, width] of token ids [rows, length]; the next pass overwrites them.

        Raises what `cuda_graphs.capture` raises.
        """
        rows, length = ids.shape
        shape = rows, bucket(length)
        if not self.told:
            self.told = True
            log.info("passes are captured, once for each of some lengths: the first steps take longer than those after")
        if shape not in self.passes:
            graphs.CAPTURE_THREAD.run(partial(self.capture, shape))
        self.latest = self.passes[shape]
        self.latest.ids.copy_(F.pad(ids, (0, shape[1] - length)))
        self.latest.replay_forward()
        return self.latest.hidden[:, :length]

    def backward(self, grad_hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """Returns the gradients of the parameters, from that of the latest hidden states; the next pass overwrites
        them."""
        assert self.latest is not None
        length = grad_hidden.shape[1]
        self.latest.grad_hidden[:, :length].copy_(grad_hidden)
        self.latest.grad_hidden[:, length:].zero_()
        self.latest.replay_backward()
        return self.gradients

    def capture(self, shape: Shape) -> None:
        """Captures the pass of a shape; called in the capture thread.

        The longest shape comes first: all others find their memory in what it took. If one is larger all the same, the
        passes captured before it are dropped.
        """
        rows, length = shape
        if not self.passes:
            self.warm_up(rows)
        longest = rows, max(length, bucket(self.longest))
        for each in dict.fromkeys([longest, shape]):
            if all(math.prod(each) > math.prod(known) for known in self.passes):
                self.renew_memory(math.prod(each))
            if each not in self.passes:
                self.passes[each] = self.capture_shape(each)

    def warm_up(self, rows: int) -> None:
        """Runs a pass that is not captured: some kernels are compiled or chosen at their first launch."""
        output = self.run(torch.zeros(rows, MIN_CAPTURE_LENGTH, dtype=torch.int64, device=self.device))
        torch.autograd.grad(output, self.parameters, torch.zeros_like(output))
        self.hidden = output.detach().new_zeros(0, output.shape[-1])

    def renew_memory(self, tokens: int) -> None:
        """Drops all passes, and starts a memory pool with room for outputs of as many tokens."""
        self.passes.clear()
        self.latest = None
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        width = self.hidden.shape[-1]
        self.hidden, self.grad_hidden = (self.hidden.new_zeros(tokens, width) for _ in range(2))

    def capture_shape(self, shape: Shape) -> CapturedPass:
        """Captures the forward and the backward pass of one shape."""
        ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        tokens = math.prod(shape)
        hidden, grad_hidden = (part[:tokens].view(*shape, -1) for part in (self.hidden, self.grad_hidden))
        outputs: list[torch.Tensor] = []  # of the forward pass, until the backward pass takes it

        def forward() -> None:
            outputs[:] = [self.run(ids)]
            hidden.copy_(outputs[0].detach())

        def backward() -> None:
            torch._foreach_copy_(self.gradients, torch.autograd.grad(outputs.pop(), self.parameters, grad_hidden))

        replay_forward = graphs.capture(forward, self.pool)
        replay_backward = graphs.capture(backward, self.pool)
        return CapturedPass(ids, hidden, grad_hidden, replay_forward, replay_backward)
