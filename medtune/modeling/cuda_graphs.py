"""Work on a GPU as a CUDA graph: recorded once, replayed in one launch, with the same numbers.

On a GPU a pass of few tokens takes its time for Python and launches, not for arithmetic
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
    """The work does something that cannot be recorded."""


class CaptureThread:
    """The one thread that records: cuBLAS and cuDNN set up what they need at a thread's first call, which cannot be
    recorded.

    `failed`: whether a recording did. PyTorch's allocator then believes for ever that it goes on: nothing more may be
    recorded in this process.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "recorder")
        self.failed = False

    def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, which calls `captured` after it has run once what is to be recorded: kernels that are
        compiled or chosen at their first launch. Raises what it raises."""
        return self.thread.submit(work).result()


CAPTURE_THREAD = CaptureThread()


def try_capture(what: str, work: Callable[[], Result]) -> Result | None:
    """What `work` returns, which records; None, and a warning that says `what`, if it cannot be or memory is short."""
    try:
        return work()
    except (CaptureError, torch.OutOfMemoryError) as error:
        why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else error
        log.warning("%s are launched kernel by kernel, which takes longer: %s", what, why)
        traceback.clear_frames(error.__traceback__)  # they hold the memory
    return None


def capture(work: Callable[[], None], pool: Any = None) -> Callable[[], None]:
    """Record what `work` launches on the GPU, without running it; what is returned runs it.

    `pool`: memory that several recordings share, which then run one after another; None: memory of its own. Raises
    `NotRecorded`, and torch.OutOfMemoryError, after which another may be recorded.
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
