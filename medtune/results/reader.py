"""Result folder -> RunResult, with everything that tables and comparisons read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import parquet

from medtune.runtime.files import read_json


@dataclass
class RunResult:
    """A run and its numbers. `results` is its folder, or one inside it for the test set of other data.

    `title`: what tables call it; the name of its folder if empty.
    """

    folder: Path
    results: Path
    title: str = ""

    def __post_init__(self) -> None:
        self.run = read_json(self.folder / "run.json")
        self.metrics = read_json(self.folder / "metrics.json")
        self.test: dict[str, Any] = read_json(self.results / "metrics.json").get("test", {})

    @property
    def name(self) -> str:
        """The name in tables."""
        return self.title or self.folder.name

    @property
    def eval_loss(self) -> float:
        """The best validation loss, by which members are ranked; infinite where there is none."""
        return self.metrics.get("best", {}).get("eval_loss", float("inf"))


def losses(member: RunResult) -> dict[str, list[Any]]:
    """Returns the columns of eval_loss.parquet, one entry for each test conversation."""
    return parquet.read_table(member.results / "eval_loss.parquet").to_pydict()
