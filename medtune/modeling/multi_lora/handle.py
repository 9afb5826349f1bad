"""What a trainer sees of the base it trains on."""

from typing import Any, Protocol


class BaseHandle(Protocol):
    """A run's place at a base through which others may go too: its own backward pass ends there."""

    def backward(self) -> None:
        """Take the gradient that it left at the base's output through the base."""

    def yield_turn(self) -> None:
        """Let the others give the GPU what they have, before it is waited for."""

    checkpointing: bool

    def view(self) -> Any:
        """The base as this run sees it."""

    def release(self) -> None:
        """Let go of the memory that training took."""
