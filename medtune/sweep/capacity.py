"""A group of members and a machine -> how many of them run at a time, and how."""

import logging
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from medtune.config.enums import QuantizationType
from medtune.config.schema import RunConfig
from medtune.modeling.memory import free_bytes, needs_checkpointing, training_bytes
from medtune.runtime.errors import UserError
from medtune.training.shared_inputs import SharedInputs

log = logging.getLogger(__name__)

MOST = 16  # members in one pass by default; with more, a pass is no faster for each (H200)
PROCESS_BYTES = 1.5e9  # memory of a worker on a CPU beside training: answers in batches, scores


@dataclass
class Concurrency:
    """`width` members train together, or as many as `processes` each on a core of its own."""

    width: int
    processes: int
    checkpointing: bool


def choose_concurrency(
    runs: Sequence[RunConfig], inputs: SharedInputs, width: int | None, processes: int | None
) -> Concurrency:
    """Decides what was left open.

    On a GPU as many members train together as its memory holds. On a CPU that saves nothing, but two processes of one
    thread do 1.4 times the work of one process of two (measured on two cores): as many processes as cores and memory.
    """
    base = inputs.base
    forks = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    problems = []
    if processes and processes > 1 and (base.device.type == "cuda" or not forks):
        problems.append("hydra.launcher.processes works on a CPU under Linux only: leave it out")
    if processes and width and processes > 1 and width > 1:
        problems.append("hydra.launcher.processes, hydra.launcher.width: members train together or apart: choose one")
    int8 = any(run.quantization and run.quantization.type is QuantizationType.int8 for run in runs)
    if int8 and width and width > 1:  # its outlier columns are those of all rows
        problems.append("hydra.launcher.width: members in int8 would change each other: choose quantization=nf4")
    if problems:
        raise UserError(*problems)
    checkpointing = any([needs_checkpointing(run, base) for run in runs])
    free = free_bytes(base.device)
    needed = max(training_bytes(run, base, checkpointing) for run in runs)
    cores = torch.get_num_threads()  # as OMP_NUM_THREADS has it, if that is set
    if width is None:
        # PyTorch holds a seventh more than a captured pass uses, twice as much with gradient checkpointing.
        share = 0.5 if checkpointing else 0.8
        fits = int(share * free / needed) if base.device.type == "cuda" and not int8 else 1
        width = max(1, min(len(runs), MOST, fits))
    if processes is None:
        alone = base.device.type == "cuda" or width > 1 or not forks
        processes = 1 if alone else min(cores, len(runs), int(0.9 * free / (needed + PROCESS_BYTES)))
        if 2 * processes <= cores:  # one after another on all cores is faster
            processes = 1
    processes = max(1, min(processes, len(runs)))
    if processes > 1:
        width = 1
    # A forked process has one thread: OpenMP's pool does not survive the fork, and would never answer.
    if processes > 1:
        log.info("%s members at a time, each on its own core", processes)
    return Concurrency(width, processes, checkpointing)
