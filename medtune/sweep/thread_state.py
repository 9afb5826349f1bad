"""Random numbers and trainer state of threads that take turns: one runs at a time.

Libraries keep some of their state in the process. The thread that has the turn finds its own there.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState

State = list[Any]


def gradient_state() -> dict[str, Any]:
    """Returns accelerate's flag for the last micro-batch, one for the whole process."""
    return dict(GradientState._shared_state)


def set_gradient_state(state: dict[str, Any]) -> None:
    """Sets it in place: the class hands the dictionary itself to its instances."""
    GradientState._shared_state.clear()
    GradientState._shared_state.update(state)


# How to read a part of the process's state, and how to restore it.
PARTS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (gradient_state, set_gradient_state),
]
if torch.cuda.is_available():
    PARTS.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))


def snapshot() -> State:
    """Returns the state of the thread that has the turn."""
    return [read() for read, _ in PARTS]


def initial() -> State:
    """Returns the state of a new member: accelerate sets up its own part."""
    return [*snapshot()[:3], {}, *snapshot()[4:]]


def restore(state: State) -> None:
    """Restores the state of the thread that gets the turn."""
    for (_, write), part in zip(PARTS, state, strict=True):
        write(part)
