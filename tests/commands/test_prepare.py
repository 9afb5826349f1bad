"""`python -m medtune.prepare` shows what a run would be taught, writes it out, and loads no weights for it."""

import json
from pathlib import Path

import hydra
import pyarrow.parquet as pq
import pytest

from helpers import conversations, write_jsonl
from medtune.config.groups import CONF, register
from medtune.config.schema import PrepareConfig
from medtune.config.validation import build_config
from medtune.prepare import prepare_data
from medtune.runtime.errors import UserError
from processes import run


def inspection(*overrides: str) -> PrepareConfig:
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return build_config(hydra.compose("prepare", list(overrides)), PrepareConfig)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    asked = "I have had a cough for three weeks, it is worse at night. <b>Is it asthma?</b>"
    extra = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": f"Perhaps{i}, ask."}]}
        for i in (1, 2)
    ]
    return write_jsonl(tmp_path / "rows.jsonl", [*conversations(60), *extra, {"messages": None}])


def test_everything_is_shown_and_written(
    tiny_overrides: list[str],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("medtune.modeling.base.load_base", lambda *args: pytest.fail("weights were loaded"))
    folder, out = tmp_path / "folder", tmp_path / "prepared"
    folder.mkdir()
    words = [*tiny_overrides, f"data.path='{rows}'", "trainer.max_length=150", "show=1", f"out='{out}'"]
    prepare_data(inspection(*words), folder)
    said = capsys.readouterr().out
    for part in (
        "local: 63 rows of ",
        "read as messages (messages: messages, group: group)",
        "unusable: cannot be read as a conversation",
        "1 whose messages are no list of {role, content}",
        "answers_per_question: that answer a question once more",
        "markup",
        "red flags: no patient describes an emergency",
        "have their question in another split, 0 nearly, 0 their group",
        "a random split by row would leak",
        "length in tokens of medtune/tiny-test: median",
        "longer than trainer.max_length=150:",
        "loss on ",
        "is for you alone: local gives no licence to pass its text on",
    ):
        assert part in said, part
    taught = said[said.index("⟦") + 1 : said.index("⟧")]
    answers = {m["content"] for row in conversations(60) for m in row["messages"] if m["role"] == "assistant"}
    assert taught in answers and "<|im_start|>user" in said and "⟦<|im_end|>⟧" in said
    report = json.loads((folder / "report.json").read_text())
    assert report["funnel"] == {"read": 63, "unusable": 1, "answers_per_question": 1, "kept": 61}
    assert report["mask"]["answers"] >= report["mask"]["checked"] == report["mask"]["of"] > 40
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")
    rules = [json.loads(line)["rule"] for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert rules == ["unusable", "answers_per_question", "max_length"]
    written = [
        row for name in ("train", "validation", "test") for row in pq.read_table(out / f"{name}.parquet").to_pylist()
    ]
    assert sorted(row["row"] for row in written) == [*range(1, 62)]
    assert all(row["messages"][0]["role"] == "system" and row["group"] and row["source"] == "local" for row in written)
    assert "Not to be passed on" in (out / "README.md").read_text()
    with pytest.raises(UserError, match=r"out=.*prepared is not empty, and nothing is overwritten"):
        prepare_data(inspection(*words), folder)


def test_what_was_written_out_can_be_trained_on_and_changes_no_more(
    tiny_overrides: list[str], rows: Path, tmp_path: Path
) -> None:
    from medtune.data.prepared import prepare

    prepare_data(inspection(*tiny_overrides, f"data.path='{rows}'", f"out='{tmp_path / 'out'}'"), tmp_path)
    written = tmp_path / "out" / "train.parquet"
    again = prepare(inspection("data=local", f"data.path='{written}'").data).report
    assert again["funnel"]["kept"] == again["funnel"]["read"] == pq.read_metadata(written).num_rows
    assert again["changed"] == {}


def test_the_command(tiny_overrides: list[str], rows: Path, tmp_path: Path) -> None:
    words = [*tiny_overrides, f"data.path='{rows}'", f"hydra.run.dir='{tmp_path / 'here'}'"]
    done = run("medtune.prepare", *words)
    assert done.returncode == 0, done.stderr
    assert "mask proof passed" in done.stdout and "Traceback" not in done.stderr
    assert {"lengths.png", "rejects.jsonl", "report.json"} <= {path.name for path in (tmp_path / "here").iterdir()}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["shw=3"], "shw: did you mean show?"),
        (["show=-1"], "show must be at least 0 (conversations), not -1"),
        (["data=medqud"], "data=medqud: did you mean data=medquad?"),
        (["data/preparation=strict"], "data/preparation=strict: there is none, standard"),
        (["data.rules.title=false"], "data.rules.title: did you mean data.rules.titles?"),
        (["data=local", "data.path=nowhere.csv"], "data.path=nowhere.csv: no such file"),
        (
            ["data=mix", "data.members.medquad.wieght=2"],
            "data.members.medquad.wieght: did you mean data.members.medquad.weight?",
        ),
        (["data=mix", "data.members.icliniq=null"], "data.members.icliniq"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], line: str, tmp_path: Path) -> None:
    done = run("medtune.prepare", *words, f"hydra.run.dir='{tmp_path}'")
    assert done.returncode == 2 and done.stderr.startswith("medtune: ") and line in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
