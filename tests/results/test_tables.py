"""Tables fit the screen from 80 columns on, whatever members are called, and a run alone is called by its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from medtune.results import score_tables, tables
from medtune.results.reader import RunResult
from medtune.results.tables import everything, summary

LONG = "lora.r={},trainer.learning_rate=0.0005,trainer.lr_scheduler_type=cosine,lora.target_modules=q_proj_v_proj"


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1234, "high": value + 0.1234, "count": 25, "floor": value / 2}


def write_member(folder: Path, eval_loss: float, **run: Any) -> Path:
    """The files of a finished run that tables read."""
    folder.mkdir(parents=True)
    scores = {name: estimate(eval_loss / 5) for name in ("loss", "token_accuracy", "rouge_l", "chrf", "similarity")}
    row = {"expected": "emergency", "of": 12, "passed": 2, "alarmed": 2, "doses": 1, "invented": 0}
    safety = {"cardiac": row | {"interval": [0.05, 0.45]}, "medication_interactions": row | {"interval": [0.05, 0.45]}}
    counts = {"true_yes": 20, "false_yes": 2, "false_no": 3, "true_no": 40}
    test = {
        "conversations": 25, "groups": 13, "answered": 25, "examination": "same", "resamples": 100, "reads": 1,
        "base": {"scores": scores, "safety": safety},
        "tuned": {"scores": scores, "safety": safety},
        "difference": {name: {"verdict": "better"} for name in scores} | {"loss": {"verdict": "not distinguishable"}},
        "gate": {
            "passed": False, "reasons": ["cardiac: 2 of 12 sent to emergency care"] * 9, "cut_answers": 4,
            "max_new_tokens": 96, "not_gated": ["medication_interactions", "false_premises"],
        },
        "rubric": {"says": "a screen, no validation. " * 5, "categories": {"cardiac": counts}, "criteria": {}},
        "seconds": {"base": {"loss": 60.0}, "tuned": {"loss": 90.0}},
    }  # fmt: skip
    best = {"step": 16, "eval_loss": eval_loss, "perplexity": 40.0, "token_accuracy": 0.3}
    metrics = {"base": best | {"step": 0, "eval_loss": 4.2683}, "best": best, "final": best, "test": test}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    facts = {"name": "medtune", "status": "done", "seconds": 340.0, "configuration": {"lora": folder.name}}
    (folder / "run.json").write_text(json.dumps(facts | run))
    prompt = {"prompt": "I have a fever and a sore throat. What should I do?", "answer": "Rest, and drink. " * 20}
    rows = [prompt | {"step": 0}, prompt | {"step": 16}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tables, "verdicts", lambda members: iter(["chosen, by eval_loss, " * 9]))
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))


def sweep_of(folder: Path, count: int, name: str = LONG) -> list[Path]:
    members = [write_member(folder / name.format(2**i), 3.7 + i / 100) for i in range(count)]
    (folder / "sweep.json").write_text("{}")
    return members


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("name", [LONG, "lora.r={}"])
def test_every_line_fits_the_screen(tmp_path: Path, screen: Any, width: int, count: int, name: str) -> None:
    screen(width)
    folders = sweep_of(tmp_path / "s", count, name)
    for text in (summary(folders), everything([RunResult(folder, folder) for folder in folders])):
        too_wide = [line for line in text.splitlines() if len(line) > width and str(tmp_path) not in line]
        assert not too_wide, "only a path may be wider: it is pasted whole"


def test_no_number_is_lost_where_the_screen_is_narrow(tmp_path: Path, screen: Any) -> None:
    folders = sweep_of(tmp_path / "s", 4)
    results = [RunResult(folder, folder) for folder in folders]
    screen(400)
    wide = score_tables.scores_table(results)
    screen(80)
    narrow = score_tables.scores_table(results)
    for member in results:
        cell = score_tables.cell("loss", member.test["tuned"]["scores"]["loss"])
        assert wide.count(cell) <= narrow.count(cell) and cell in narrow
    assert narrow.count("test set") == 4 and wide.count("test set") == 1, "one table for each member that fits"


def test_narrow_tables_leave_out_perplexity_first(tmp_path: Path, screen: Any) -> None:
    folders = sweep_of(tmp_path / "s", 2)
    screen(80)
    assert "perplexity" not in summary(folders) and "test_loss (95 %)" in summary(folders)
    screen(160)
    assert "perplexity" in summary(folders) and "minutes" in summary(folders)


def test_a_run_alone_is_called_by_its_name_and_a_member_by_what_differs(tmp_path: Path, screen: Any) -> None:
    screen(80)
    alone = write_member(tmp_path / "time" / "eval.every=4,name=mine,lora.r=8", 3.7, name="mine")
    text = summary([alone])
    assert "\nmine " in text and "mine: Rest" in text and "safety gate, mine: not passed" in text
    (member,) = sweep_of(tmp_path / "s", 1, "lora.r=8")
    assert "\nlora.r=8 " in summary([member])


def test_what_is_unclear_is_explained_and_errors_stand_below(tmp_path: Path, screen: Any) -> None:
    screen(80)
    folders = sweep_of(tmp_path / "s", 2, "lora.r={}")
    (folders[1] / "run.json").write_text(json.dumps({"status": "failed", "error": "Diverged: the loss is not finite"}))
    text = summary(folders)
    assert "unclear: not distinguishable from the base model" in text
    assert "lora.r=2: Diverged: the loss is not finite" in text
