"""What a trainer sees of the base model that it trains on."""

from typing import Any, Protocol


class BaseHandle(Protocol):
    """A run's way to a base model that others may share. The run's own backward pass ends at the base's output."""

    checkpointing: bool

    def view(self) -> Any:
        """Returns the base model as this run sees it."""

    def backward(self) -> None:
        """Propagates the gradient at the base's output through the base, to the run's adapter."""

    def yield_turn(self) -> None:
        """Lets other members queue their work on the GPU before this run synchronizes with it."""

    def release(self) -> None:
        """Frees the memory that training took."""
