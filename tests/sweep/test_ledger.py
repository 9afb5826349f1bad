"""sweep.json: what is left to do, what is refused, and who is stopped early."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from medtune.config.schema import RunConfig
from medtune.config.serialize import to_plain
from medtune.runtime.errors import UserError
from medtune.runtime.files import read_json, read_jsonl
from medtune.sweep import members as engine
from medtune.sweep.halving import Halving, Rung
from medtune.sweep.ledger import Member, folder_of, open_ledger
from medtune.sweep.pipeline import Settings, grouped, run_sweep

Compose = Callable[..., RunConfig]
ONE = Settings(width=1, processes=1, prune=None)


def members_of(tiny_run: Compose, sweep: Path, *each: str) -> list[Member]:
    return [Member(word, tiny_run(*word.split()), folder_of(sweep, word)) for word in each]


def rows_of(sweep: Path) -> dict[str, Any]:
    return {row["overrides"]: row for row in read_json(sweep / "sweep.json")["members"]}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the members that were trained, in their order."""
    names: list[str] = []
    stock = engine.train

    def noted(run: RunConfig, out: Path, *more: Any) -> float:
        names.append(out.name)
        return stock(run, out, *more)

    monkeypatch.setattr(engine, "train", noted)
    return names


def run(members: Sequence[Member], sweep: Path, settings: Settings = ONE) -> None:
    with open_ledger(sweep, ["the", "command"]) as found:
        found.add_members(members)
        run_sweep(members, found, settings)


def test_a_second_time_only_what_is_left_is_done(tiny_run: Compose, tmp_path: Path, trained: list[str]) -> None:
    each = ["lora.r=2", "lora.target_modules=[nope]", "lora.r=4"]
    run(members_of(tiny_run, tmp_path, *each), tmp_path)
    assert [row["status"] for row in rows_of(tmp_path).values()] == ["done", "refused", "done"]
    assert len(trained) == 3
    facts = read_json(tmp_path / "lora.r=4" / "run.json")
    run(members_of(tiny_run, tmp_path, *each, "lora.r=8"), tmp_path)
    assert trained[3:] == [folder_of(tmp_path, each[1]).name, "lora.r=8"], (
        "a failed one is tried again, a new one joins"
    )
    assert read_json(tmp_path / "lora.r=4" / "run.json") == facts
    assert list(rows_of(tmp_path)) == [*each, "lora.r=8"]
    assert read_json(tmp_path / "sweep.json")["command"] == ["the", "command"]


def test_a_row_is_found_by_its_configuration_whatever_it_is_called(
    tiny_run: Compose, tmp_path: Path, trained: list[str]
) -> None:
    run(members_of(tiny_run, tmp_path, "lora.r=2"), tmp_path)
    (renamed,) = members_of(tiny_run, tmp_path, "lora.r=2 wandb.project=other")
    run([renamed], tmp_path)
    assert renamed.folder == tmp_path / "lora.r=2" and len(trained) == 1


def test_a_row_whose_configuration_changed_is_refused(tiny_run: Compose, tmp_path: Path, trained: list[str]) -> None:
    run(members_of(tiny_run, tmp_path, "lora.r=2"), tmp_path)
    before = (tmp_path / "sweep.json").read_text()
    changed = Member("lora.r=2", tiny_run("lora.r=2", "trainer.weight_decay=0.1"), tmp_path / "lora.r=2")
    with pytest.raises(
        UserError, match=r"lora\.r=2 holds a member that differs in trainer\.weight_decay \(0\.0, now 0\.1\)"
    ):
        run([changed], tmp_path)
    assert (tmp_path / "sweep.json").read_text() == before and len(trained) == 1


def test_members_beside_others_of_changed_data_are_refused(
    tiny_run: Compose, data_file: Path, tmp_path: Path, trained: list[str]
) -> None:
    copy = tmp_path / "conversations.jsonl"
    copy.write_bytes(data_file.read_bytes())
    words = [f"lora.r={rank} data.path={copy}" for rank in (2, 4)]
    sweep = tmp_path / "sweep"
    run([Member("first", tiny_run(*words[0].split()), sweep / "first")], sweep)
    copy.write_bytes(b"".join(data_file.read_bytes().splitlines(keepends=True)[:-2]))
    run([Member("second", tiny_run(*words[1].split()), sweep / "second")], sweep)
    facts = read_json(sweep / "second" / "run.json")
    assert facts["status"] == "refused" and "the data is no longer what first was trained on" in facts["error"]
    assert trained == ["first"] and rows_of(sweep)["first"]["status"] == "done"


def test_two_that_are_the_same_are_refused(tiny_run: Compose, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two members are the same: lora\.r=2 and lora\.r=2 lora\.lora_alpha=4"):
        run(members_of(tiny_run, tmp_path, "lora.r=2", "lora.r=2 lora.lora_alpha=4"), tmp_path)


def test_two_processes_do_not_share_a_folder(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", lambda self, timeout=0: stock(self, timeout=0))
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="is in use by another process"):
        run(members_of(tiny_run, tmp_path, "lora.r=2"), tmp_path)
    assert not (tmp_path / "sweep.json").exists()


def test_a_process_that_was_killed_leaves_an_interrupted_member(tiny_run: Compose, tmp_path: Path) -> None:
    (member,) = members_of(tiny_run, tmp_path, "lora.r=2")
    member.folder.mkdir()
    (member.folder / "run.json").write_text(json.dumps({"status": "running", "configuration": to_plain(member.run)}))
    with open_ledger(tmp_path, []) as found:
        found.add_members([member])
    assert rows_of(tmp_path)["lora.r=2"]["status"] == "interrupted"


def test_a_hundred_members_with_any_names(tiny_run: Compose, tmp_path: Path) -> None:
    run = tiny_run()
    words = [f"seed={i},data.path={'long/' * 60}é{i}.jsonl" for i in range(100)]
    members = [Member(word, replace(run, seed=i), folder_of(tmp_path, word)) for i, word in enumerate(words)]
    with open_ledger(tmp_path, []) as found:
        found.add_members(members)
    folders = {member.folder for member in members}
    assert len(folders) == len(rows_of(tmp_path)) == 100
    assert all(folder.parent == tmp_path and len(folder.name.encode()) < 255 for folder in folders)


def test_members_that_need_another_base_stand_apart(tiny_run: Compose, tmp_path: Path, trained: list[str]) -> None:
    each = ["lora.r=2", "quantization=none lora.r=2", "lora.r=4", "trainer.max_length=128", "seed=7"]
    members = members_of(tiny_run, tmp_path, *each)
    groups = [[member.name for member in group] for group in grouped(members)]
    assert groups == [["lora.r=2", "lora.r=4", "seed=7"], ["quantization=none lora.r=2"], ["trainer.max_length=128"]]
    run(members[:3], tmp_path)
    bases = {
        row["overrides"]: read_json(tmp_path / row["folder"] / "run.json")["base"]["fingerprint"]
        for row in rows_of(tmp_path).values()
    }
    assert bases["lora.r=2"] == bases["lora.r=4"] != bases["quantization=none lora.r=2"]


def test_a_foundation_that_cannot_be_laid_is_every_members_end(
    tiny_run: Compose, tmp_path: Path, trained: list[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    each = [f"model.path={tmp_path}/nothing lora.r={rank}" for rank in (2, 4)]
    members = members_of(tiny_run, tmp_path / "sweep", *each, "lora.r=8")
    run(members, tmp_path / "sweep")
    rows = rows_of(tmp_path / "sweep")
    assert [row["status"] for row in rows.values()] == ["refused", "refused", "done"] and trained == ["lora.r=8"]
    assert str(tmp_path / "nothing") in rows[each[1]]["error"]


@pytest.mark.parametrize("setting", ["width=0", "processes=two", "prune=1", "width=1.5", "processes=true"])
def test_settings_that_cannot_be(setting: str) -> None:
    name, value = setting.split("=")
    given = {
        "width": None,
        "processes": None,
        "prune": None,
        name: {"true": True, "two": "two", "1.5": 1.5}.get(value) or int(value),
    }
    with pytest.raises(UserError, match=rf"hydra\.launcher\.{name} must be a whole number of at least"):
        Settings(**given)


# --- successive halving ----------------------------------------------------------------------------------------------

RATES = ["1e-6", "3e-3", "1e-5", "1e-3", "1e-4"]


def test_halving_keeps_the_best_at_every_rung(tiny_run: Compose, tmp_path: Path) -> None:
    common = "trainer.max_steps=8 eval.every=2 trainer.lr_scheduler_type=constant"
    each = [f"trainer.learning_rate={rate} {common}" for rate in RATES]
    members = members_of(tiny_run, tmp_path, *each)
    run(members, tmp_path, Settings(1, 1, 2))
    kept = read_json(tmp_path / "sweep.json")["rungs"]
    assert [(rung["evaluation"], rung["step"]) for rung in kept] == [(1, 2), (2, 4)], (
        "nobody is stopped at the last step"
    )
    keys = {rate: member.key for rate, member in zip(RATES, members, strict=True)}
    assert kept[0]["kept"] == [keys["3e-3"], keys["1e-3"], keys["1e-4"]]
    assert kept[0]["pruned"] == [keys["1e-5"], keys["1e-6"]]
    assert kept[1]["kept"] == [keys["3e-3"], keys["1e-3"]]
    for member in members:
        steps = [row["step"] for row in read_jsonl(member.folder / "history.jsonl") if "loss" in row]
        assert (
            max(steps)
            == {"1e-5": 2, "1e-6": 2, "1e-4": 4, "1e-3": 8, "3e-3": 8}[member.name.split()[0].partition("=")[2]]
        )
        assert (member.folder / "adapter").is_dir() == (max(steps) == 8)
    statuses = [row["status"] for row in rows_of(tmp_path).values()]
    assert statuses == ["pruned", "done", "pruned", "done", "pruned"]

    # Those that are kept end as if nobody had been judged; and the decisions do not depend on the order.
    alone = members_of(tiny_run, tmp_path / "alone", each[1])
    run(alone, tmp_path / "alone")
    ours, theirs = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (members[1].folder, alone[0].folder)
    )
    assert ours == theirs
    run(members_of(tiny_run, tmp_path / "reversed", *reversed(each)), tmp_path / "reversed", Settings(1, 1, 2))
    decisions = read_json(tmp_path / "reversed" / "sweep.json")["rungs"]
    assert [(d["kept"], d["pruned"]) for d in decisions] == [(d["kept"], d["pruned"]) for d in kept]


def test_halving_that_was_stopped_stands_by_its_decisions(
    tiny_run: Compose, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = "trainer.max_steps=4 eval.every=2 trainer.lr_scheduler_type=constant"
    members = members_of(tiny_run, tmp_path, *(f"trainer.learning_rate={rate} {common}" for rate in RATES[:3]))
    decide = Halving.decide

    def killed(self: Halving, rung: Rung) -> dict[str, Any]:
        decide(self, rung)
        raise KeyboardInterrupt

    monkeypatch.setattr(Halving, "decide", killed)
    with pytest.raises(KeyboardInterrupt):
        run(members, tmp_path, Settings(1, 1, 3))
    (before,) = read_json(tmp_path / "sweep.json")["rungs"]
    monkeypatch.setattr(Halving, "decide", decide)
    run(members, tmp_path, Settings(1, 1, 3))
    assert read_json(tmp_path / "sweep.json")["rungs"][0] == before
    assert [row["status"] for row in rows_of(tmp_path).values()] == ["pruned", "done", "pruned"]
    assert len(trained) == 4


def test_halving_does_not_compare_what_cannot_be_compared(tiny_run: Compose, tmp_path: Path) -> None:
    members = members_of(tiny_run, tmp_path, "lora.r=2", "eval.every=2")
    with pytest.raises(
        UserError, match=r"lora\.r=2 and eval\.every=2 differ in eval\.every \(3, now 2\): leave prune out"
    ):
        run(members, tmp_path, Settings(1, 1, 2))
