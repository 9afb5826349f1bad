"""Members are compared over the same conversations; what differs by its seed is one."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from medtune.results.comparison import format_interval, replicates, verdicts
from medtune.results.reader import RunResult

CONVERSATIONS = [str(i) for i in range(8)]


def write_member(folder: Path, eval_loss: float, nll: list[float], **configuration: Any) -> RunResult:
    """A member that was evaluated on conversations of 10 tokens, each a group; the base model's loss is 3."""
    folder.mkdir()
    loss = {"value": sum(nll) / 80}
    test = {"conversations": 8, "groups": 8, "resamples": 100, "tuned": {"scores": {"loss": loss}}}
    (folder / "metrics.json").write_text(json.dumps({"best": {"eval_loss": eval_loss}, "test": test}))
    (folder / "run.json").write_text(json.dumps({"configuration": configuration}))
    columns = {"conversation": CONVERSATIONS, "group": CONVERSATIONS, "tokens": [10] * 8, "tuned_nll": nll}
    parquet.write_table(pa.table(columns | {"base_nll": [30.0] * 8}), folder / "eval_loss.parquet")
    return RunResult(folder, folder)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (None, ""),
        ({"value": None, "low": None, "high": None}, ""),
        ({"value": 3.756, "low": None, "high": None}, "3.7560"),
        ({"value": 3.756, "low": float("nan"), "high": float("nan")}, "3.7560"),
        ({"value": 3.756, "low": 3.61, "high": 3.9}, "3.7560 (3.610 to 3.900)"),
    ],
)
def test_an_interval_as_text(numbers: dict[str, Any] | None, text: str) -> None:
    assert format_interval(numbers) == text


def test_the_best_by_validation_is_compared_to_the_base_and_the_others(tmp_path: Path) -> None:
    worse = write_member(tmp_path / "lora.r=4", 2.5, [25.0] * 8, lora=4)
    chosen = write_member(tmp_path / "lora.r=8", 2.0, [20.0] * 8, lora=8)
    (text,) = verdicts([worse, chosen])
    assert text.splitlines() == [
        "lora.r=8, chosen by eval_loss, on 8 test conversations in 8 groups (difference of test loss, paired, 95 %):",
        "  vs base model: -1.0000 (-1.000 to -1.000): better",
        "  vs lora.r=4: -0.5000 (-0.500 to -0.500): better",
    ]


def test_another_test_set_is_not_compared(tmp_path: Path) -> None:
    chosen = write_member(tmp_path / "lora.r=8", 2.0, [20.0] * 8, lora=8)
    other = write_member(tmp_path / "lora.r=4", 2.5, [25.0] * 8, lora=4)
    table = parquet.read_table(other.results / "eval_loss.parquet").to_pydict()
    parquet.write_table(pa.table(table | {"conversation": CONVERSATIONS[::-1]}), other.results / "eval_loss.parquet")
    (text,) = verdicts([chosen, other])
    assert text.endswith("\n  vs lora.r=4: not comparable, its test set is another")


def test_seeds_are_averaged_and_their_spread_is_shown(tmp_path: Path) -> None:
    first = write_member(tmp_path / "seed=1", 2.0, [20.0] * 8, seed=1, name="a")
    second = write_member(tmp_path / "seed=2", 2.2, [24.0] * 8, seed=2, name="b")
    other = write_member(tmp_path / "lora.r=4", 2.5, [25.0] * 8, seed=1, lora=4)
    assert replicates([first, other, second]) == [[first, second], [other]]
    (text,) = verdicts([first, other, second])
    assert "the mean of seed=1, seed=2, chosen" in text and "vs base model: -0.8000" in text
    assert text.endswith("  2 seeds (seed=1, seed=2): test loss 2.2000, standard deviation 0.2828")


def test_without_an_evaluation_there_is_nothing_to_compare(tmp_path: Path) -> None:
    assert list(verdicts([RunResult(tmp_path, tmp_path)])) == []
