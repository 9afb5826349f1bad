"""Work on a GPU as a CUDA graph: captured once, replayed in one launch, with the same numbers.

A pass of few tokens takes its time for Python and launches, not for arithmetic
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import logging
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class CaptureError(Exception):
    """The work does something that cannot be captured."""


class CaptureThread:
    """The one thread that captures: cuBLAS and cuDNN set up what they need at a thread's first call, which cannot be
    captured.

    `failed`: whether a capture did. PyTorch's allocator then takes the capture for unfinished, and nothing more may be
    captured in this process.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "capture")
        self.failed = False

    def run(self, work: Callable[[], Result]) -> Result:
        """Runs `work` in the thread, and returns or raises what it does.

        `work` runs once what it is to `capture`, before it captures it: some kernels are compiled or chosen at their
        first launch.
        """
        return self.thread.submit(work).result()


CAPTURE_THREAD = CaptureThread()


def try_capture(what: str, work: Callable[[], Result]) -> Result | None:
    """Returns what `work` returns, which captures. Where that fails or memory is short: None, with a warning that names
    `what`."""
    try:
        return work()
    except (CaptureError, torch.OutOfMemoryError) as error:
        why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else error
        log.warning("%s are launched kernel by kernel, which takes longer: %s", what, why)
        traceback.clear_frames(error.__traceback__)  # they hold the memory
    return None


def capture(work: Callable[[], None], pool: Any = None) -> Callable[[], None]:
    """Captures what `work` launches on the GPU, without running it; returns a function that runs it.

    `pool`: memory that several graphs share, which then run one after another; None: memory of its own. Raises
    `CaptureError`, and torch.OutOfMemoryError, after which other work may be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        CAPTURE_THREAD.failed = True
        raise CaptureError(str(error.__context__ or error).partition("\n")[0]) from error
    return graph.replay
