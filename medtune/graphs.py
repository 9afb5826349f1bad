"""Work on a GPU as a CUDA graph: recorded once, replayed in one launch, with the same numbers.

On a GPU a pass of few tokens takes its time for Python and launches, not for arithmetic
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# One thread records: cuBLAS and cuDNN set up what they need at a thread's first call, which cannot be recorded. What a
# recording that fails leaves behind, as another current stream, is left there too.
RECORDER = ThreadPoolExecutor(1, "recorder")


class NotRecorded(Exception):
    """The work does something that cannot be recorded."""


def recording(work: Callable[[], Result]) -> Result:
    """What `work` returns, which calls `captured`. Raises `NotRecorded`, and torch.OutOfMemoryError.

    All that is to be recorded must have run in it once: kernels that are compiled or chosen at their first launch.
    """
    try:
        return RECORDER.submit(work).result()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NotRecorded(str(error).splitlines()[0]) from error


def captured(work: Callable[[], None], pool: Any = None) -> Callable[[], None]:
    """Record what `work` launches on the GPU, without running it; what is returned runs it.

    `pool`: memory that several recordings share, which then run one after another; None: memory of its own.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay
