"""The one place where the `forward` of a module is replaced, and the answer to "which forward runs here?".

A replaced forward is a plain attribute of the module: calling it costs nothing more. The module keeps the names of all
its replacements, in their order; views that share its weights keep their own.

`print(describe_forwards(model))` shows them for a loaded model. Every run writes this table to its train.log.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

NAMES = "replaced_forwards"  # attribute of a module: the names of its forwards, from the first to the last


def replace_forward(module: nn.Module, forward: Callable[..., Any], name: str) -> None:
    """Makes `module` run `forward` from now on. `name` says what it does, for `describe_forwards`."""
    vars(module)["forward"] = forward
    vars(module)[NAMES] = (*replaced_forwards(module), name)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any], name: str) -> Iterator[None]:
    """Replaces the forward of `module` for a while."""
    before = {key: vars(module)[key] for key in ("forward", NAMES) if key in vars(module)}
    replace_forward(module, forward, name)
    try:
        yield
    finally:
        for key in ("forward", NAMES):
            del vars(module)[key]
        vars(module).update(before)


def replaced_forwards(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the forwards that were put on a module, from the first to the last."""
    return vars(module).get(NAMES, ())


def describe_forwards(model: nn.Module) -> str:
    """Returns a line for each kind of layer: its class, how many there are, and its forwards in their order.

    The last one runs; it may call those before it. A layer of which nothing was replaced runs its class's own.
    """
    kinds = Counter((kind_of(module), replaced_forwards(module)) for module in model.modules())
    width = max(len(name) for name, _ in kinds)
    lines = []
    for (name, forwards), count in sorted(kinds.items()):
        lines.append(f"{name:<{width}} {count:>4}  {' -> '.join(['its own', *forwards])}")
    return "\n".join(lines)


def kind_of(module: nn.Module) -> str:
    """Returns the library and the class of a module: both PEFT and bitsandbytes have a Linear4bit."""
    return f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"
