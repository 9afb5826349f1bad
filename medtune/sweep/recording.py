"""A pass through the base as two CUDA graphs: recorded once for a shape of its rows, replayed for every other batch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from medtune import graphs

LEAST = 64  # tokens: shorter rows are filled up to that


def bucket(length: int) -> int:
    """The length in tokens to which rows of `length` are filled up: few lengths, at most an eighth longer."""
    step = max(LEAST, 2 ** (length - 1).bit_length() // 16)
    return -(-length // step) * step


class Recording:
    """The pass of rows of one shape [rows, length], whose intermediate results stay in the memory pool."""

    def __init__(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        ids: torch.Tensor,
        pool: Any,
    ) -> None:
        self.ids = ids
        self.ends: list[torch.Tensor] = []  # of the pass that is being recorded
        self.output = torch.empty(0)

        def ahead() -> None:
            self.ends = [run(self.ids)]
            self.output = self.ends[0].detach()

        def back() -> None:
            found = torch.autograd.grad(self.ends.pop(), parameters, self.of_output)
            torch._foreach_copy_(list(gradients), found)

        self.ahead = graphs.captured(ahead, pool)
        self.of_output = torch.zeros_like(self.output)
        self.back = graphs.captured(back, pool)


class Recordings:
    """The passes of one set of adapters. All use the same memory, so that a pass ends before the next one begins.

    `run`: hidden states [rows, length, width] of token ids [rows, length], a function of `parameters` too.
    """

    def __init__(
        self, run: Callable[[torch.Tensor], torch.Tensor], parameters: Sequence[torch.Tensor], device: torch.device
    ) -> None:
        self.run, self.parameters, self.device = run, parameters, device
        self.gradients = [torch.zeros_like(parameter) for parameter in parameters]
        self.known: dict[tuple[int, int], Recording] = {}
        self.pool: Any = None
        self.latest: Recording | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, length, width] of token ids [rows, length]; gone with the next pass."""
        length = ids.shape[1]
        shape = ids.shape[0], bucket(length)
        if shape not in self.known:
            self.record(shape)
        self.latest = self.known[shape]
        self.latest.ids.copy_(F.pad(ids, (0, shape[1] - length)))
        self.latest.ahead()
        return self.latest.output[:, :length]

    def backward(self, of_hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """The gradients of the parameters, from that at the latest hidden states; gone with the next pass."""
        assert self.latest is not None
        length = of_hidden.shape[1]
        self.latest.of_output[:, :length].copy_(of_hidden)
        self.latest.of_output[:, length:].zero_()
        self.latest.back()
        return self.gradients

    def record(self, shape: tuple[int, int]) -> None:
        """Record the pass of a shape. Raises what `graphs.recording` raises.

        One larger than all before begins anew: from the largest down, each finds its memory in that of the largest.
        """
        graphs.recording(partial(self.record_here, shape))

    def record_here(self, shape: tuple[int, int]) -> None:
        """See `record`; in the thread that records."""
        if not self.known:
            self.warm_up(shape[0])
        if all(shape[0] * shape[1] > rows * length for rows, length in self.known):
            self.known.clear()
            self.latest = self.pool = None
            if self.device.type == "cuda":
                self.pool = torch.cuda.graph_pool_handle()
        ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.known[shape] = Recording(self.run, self.parameters, self.gradients, ids, self.pool)

    def warm_up(self, rows: int) -> None:
        """Kernels that are compiled or chosen at their first launch have it before they are recorded."""
        output = self.run(torch.zeros(rows, LEAST, dtype=torch.int64, device=self.device))
        torch.autograd.grad(output, self.parameters, torch.zeros_like(output))
