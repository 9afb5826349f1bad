"""A group of members and a machine -> how many of them are run at a time, and how."""

import logging
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from medtune.config import Run
from medtune.foundation import Foundation
from medtune.memory import free_bytes, member_bytes, needs_checkpointing

log = logging.getLogger(__name__)

MOST = 16  # members in one pass, where nobody said how many: beyond, a pass is no faster for each
PROCESS_BYTES = 1.5e9  # what a worker takes on a CPU beside training: answers in batches, scores


@dataclass
class Size:
    """`width` members train together in each of `processes`, which have `threads` each."""

    width: int
    processes: int
    threads: int
    checkpointing: bool


def plan(runs: Sequence[Run], foundation: Foundation, width: int | None, processes: int | None) -> Size:
    """Decide what was left open.

    On a GPU, as many members go together as its memory holds. On a CPU packing saves nothing, but two processes of one
    thread do 1.4 times the work of one process of two: as many processes as there are cores and memory.
    """
    base = foundation.base
    checkpointing = any([needs_checkpointing(run, base) for run in runs])
    free = free_bytes(base.device)
    needed = max(member_bytes(run, base, checkpointing) for run in runs)
    cores = torch.get_num_threads()  # as OMP_NUM_THREADS has it, if that is set
    if width is None:
        fits = int(0.9 * free / needed) if base.device.type == "cuda" else 1
        width = max(1, min(len(runs), MOST, fits))
    if processes is None:
        forks = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
        alone = base.device.type == "cuda" or width > 1 or not forks
        processes = 1 if alone else min(cores, int(0.9 * free / (needed + PROCESS_BYTES)))
    processes = max(1, min(processes, len(runs)))
    if processes > 1:
        width = 1
    threads = max(1, cores // processes)
    if processes > 1:
        log.info("%s members at a time, each on its own core", processes)
    return Size(width, processes, threads, checkpointing)
