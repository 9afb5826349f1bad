"""A pass through the base as two CUDA graphs: recorded once for a shape of its rows, replayed for every other batch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from medtune.modeling import cuda_graphs as graphs

MIN_CAPTURE_MEMBERS = 64  # tokens: shorter rows are filled up to that


def bucket(length: int) -> int:
    """The length in tokens to which rows of `length` are filled up: few lengths, at most an eighth longer."""
    step = max(MIN_CAPTURE_MEMBERS, 2 ** (length - 1).bit_length() // 16)
    return -(-length // step) * step


class CapturedPass:
    """The pass of rows of one shape, whose intermediate results stay in the memory pool.

    `ids` [rows, length], `hidden` and `of_hidden` [rows, length, width]: where its input is, its output, and the
    gradient there.
    """

    def __init__(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        ids: torch.Tensor,
        hidden: torch.Tensor,
        of_hidden: torch.Tensor,
        pool: Any,
    ) -> None:
        self.ids, self.hidden, self.of_hidden = ids, hidden, of_hidden
        ends: list[torch.Tensor] = []  # of the pass that is being recorded

        def ahead() -> None:
            ends[:] = [run(ids)]
            hidden.copy_(ends[0].detach())

        def back() -> None:
            torch._foreach_copy_(list(gradients), torch.autograd.grad(ends.pop(), parameters, of_hidden))

        self.ahead = graphs.capture(ahead, pool)
        self.back = graphs.capture(back, pool)


class CapturedPasses:
    """The passes of one set of adapters. All use the same memory, so that a pass ends before the next one begins.

    `run`: hidden states [rows, length, width] of token ids [rows, length], a function of `parameters` too. `longest`:
    of the rows that may come, in tokens.
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
        self.known: dict[tuple[int, int], CapturedPass] = {}
        self.latest: CapturedPass | None = None
        self.hidden = self.of_hidden = torch.empty(0, device=device)
        self.pool: Any = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, length, width] of token ids [rows, length]; gone with the next pass.

        Raises what `graphs.captured` raises.
        """
        rows, length = ids.shape
        shape = rows, bucket(length)
        if shape not in self.known:
            graphs.CAPTURE_THREAD.run(partial(self.record, shape))
        self.latest = self.known[shape]
        self.latest.ids.copy_(F.pad(ids, (0, shape[1] - length)))
        self.latest.ahead()
        return self.latest.hidden[:, :length]

    def backward(self, of_hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """The gradients of the parameters, from that at the latest hidden states; gone with the next pass."""
        assert self.latest is not None
        length = of_hidden.shape[1]
        self.latest.of_hidden[:, :length].copy_(of_hidden)
        self.latest.of_hidden[:, length:].zero_()
        self.latest.back()
        return self.gradients

    def record(self, shape: tuple[int, int]) -> None:
        """Record the pass of a shape, in the thread that records. The longest comes first: all others find their memory
        in what it took. If one is larger all the same, it begins anew."""
        rows, length = shape
        if not self.known:
            self.warm_up(rows)
        for each in dict.fromkeys([(rows, max(length, bucket(self.longest))), shape]):
            tokens = rows * each[1]
            if all(tokens > count * filled for count, filled in self.known):
                self.known.clear()
                self.latest = None
                self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
                width = self.hidden.shape[-1]
                self.hidden, self.of_hidden = (self.hidden.new_zeros(tokens, width) for _ in range(2))
            if each not in self.known:
                ids = torch.zeros(each, dtype=torch.int64, device=self.device)
                hidden, of_hidden = (part[:tokens].view(*each, -1) for part in (self.hidden, self.of_hidden))
                self.known[each] = CapturedPass(
                    self.run, self.parameters, self.gradients, ids, hidden, of_hidden, self.pool
                )

    def warm_up(self, rows: int) -> None:
        """Kernels that are compiled or chosen at their first launch have it before they are recorded."""
        output = self.run(torch.zeros(rows, MIN_CAPTURE_MEMBERS, dtype=torch.int64, device=self.device))
        torch.autograd.grad(output, self.parameters, torch.zeros_like(output))
        self.hidden = output.detach().new_zeros(0, output.shape[-1])
