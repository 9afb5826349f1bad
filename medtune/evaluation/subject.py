"""The model that is evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.modeling.loss import unwrap_peft


@dataclass
class Subject:
    """A base model, alone or with an adapter.

    `base_fingerprint`: sha256 of the frozen base model. `adapter`: the folder of the saved adapter; None for a base
    model alone.
    """

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base_fingerprint: str
    adapter: Path | None = None

    @property
    def base(self) -> PreTrainedModel:
        """The base model itself."""
        return unwrap_peft(self.model)

    @property
    def title(self) -> str:
        """What log lines call it."""
        return "base model" if self.adapter is None else "adapter"

    def base_alone(self) -> "Subject":
        """Returns the base model as a subject of its own. Use it inside `without_adapter`."""
        return Subject(self.base, self.tokenizer, self.base_fingerprint)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Switches the adapter off for a while."""
        if not isinstance(self.model, PeftModel):
            yield
            return
        with self.model.disable_adapter():
            yield
