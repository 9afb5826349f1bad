"""Overrides are completed as they were typed when the sweep was begun."""

import json
from pathlib import Path
from random import Random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st

from medtune.config.overrides import check_overrides, needs_sweep, quoted, resume_sweep_overrides, values_of
from medtune.config.resolvers import folder_name
from medtune.config.schema import EvaluateConfig, RunConfig
from medtune.runtime.errors import UserError


def sweep_begun_with(folder: Path, *words: str) -> Path:
    (folder / "sweep.json").write_text(json.dumps({"command": words, "members": []}))
    return folder


@pytest.mark.parametrize("launcher", ["packed", "shared_base"])
def test_a_sweep_resumes_under_the_launchers_new_name(tmp_path: Path, launcher: str) -> None:
    sweep = sweep_begun_with(tmp_path, f"hydra/launcher={launcher}", "hydra.launcher.width=2", "lora.r=4,8")
    words = resume_sweep_overrides([f"sweep={sweep}"])
    assert words == [
        "hydra/launcher=shared_base", "hydra.launcher.width=2", "lora.r=4,8", f'hydra.sweep.dir="{sweep}"'
    ]  # fmt: skip
    assert not list(check_overrides(words, RunConfig))


def test_what_is_typed_now_wins_over_how_a_sweep_was_run(tmp_path: Path) -> None:
    sweep = sweep_begun_with(tmp_path, "hydra/launcher=packed", "lora.r=4,8")
    words = resume_sweep_overrides([f"sweep={sweep}", "hydra/launcher=basic"])
    assert words == ["lora.r=4,8", "hydra/launcher=basic", f'hydra.sweep.dir="{sweep}"']


@pytest.mark.parametrize(("words", "line"), [(["sweep="], "names no folder"), (["sweep=nowhere"], "no sweep in it")])
def test_a_sweep_that_cannot_be_resumed_is_refused(words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        resume_sweep_overrides(words)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("experiment=smoke,lora_rank", "one cannot be swept: python -m medtune.train experiment=smoke; python -m"),
        ("lora=glob(x*)", "lora=glob(x*): matches none of all_linear, attention"),
        ("experiment=choice(lora_rank)", "one cannot be swept: python -m medtune.train experiment=lora_rank"),
        ("lora.r=glob(*)", "glob() chooses among the options of a group: give a key its values, as lora.r=1,2"),
        ("hydra.sweep.subdir=same", "members are called by what differs between them"),
        ("hydra/job_logging=disabled", "medtune has a log of its own"),
        ("hydra.job.chdir=true", "relative paths would be looked for in the result folder"),
        ("lora.target_modules=[a],3", "lora.target_modules must be a list"),
        ("+model=llama3_8b", "leave the + out: model=llama3_8b"),
        ("lora=null", "lora=null: there is all_linear, attention"),
        ("hydra.lancher.width=2", "hydra.lancher.width: did you mean hydra.launcher?"),
    ],
)
def test_what_cannot_be_swept_or_changed_is_one_line(word: str, line: str) -> None:
    (found,) = check_overrides([word], RunConfig)
    assert line in found


@pytest.mark.parametrize(
    "word",
    [
        "lora=glob(*)", "lora=glob([a*,b*],exclude=x*)", "lora=choice(attention,all_linear)", "lora.r=range(4,16,4)",
        'lora.target_modules=["q_proj"],["v_proj"]', 'eval.prompts=["a, b"],["c"]', "lora.r=sort(16,4)",
        "lora=glob(*,exclude=x*)", "lora.r=sort(16,4,reverse=true)", "lora.r=range(4,16,step=4)",
        "lora.r=shuffle(4,8)", "trainer.learning_rate=tag(log,interval(1e-5,1e-3))", "lora.r=int(4.0)", "seed=1,2",
        "hydra.job.chdir=false", "hydra/job_logging=default", "experiment=llama3_8b",
    ],
)  # fmt: skip
def test_hydras_own_forms_are_understood(word: str) -> None:
    assert not list(check_overrides([word], RunConfig)) and quoted(word) == word


def test_a_command_that_takes_one_value_says_how_several_are_typed() -> None:
    assert list(check_overrides(["run=a,b"], EvaluateConfig)) == [
        "run has several values: put them in brackets, as 'run=[a,b]'"
    ]
    assert list(check_overrides(["lora.r=4,8"], EvaluateConfig)) == [
        "lora.r has several values: give it one (a list stands in brackets)"
    ]


MANY = settings(max_examples=10_000, derandomize=True, deadline=None, database=None)
WORDS = [
    "lora.r=4",
    "seed=1",
    "a/b",
    "'c d'",
    "x" * 130,
    "é" * 90,
    "病" * 50,
    "[e,f]",
    "{g:1}",
    "..",
    "\0",
    "=",
    ",",
    " ",
]
VALUES = ["1", "-2", "a", "'b c'", '"d,e"', "[f,g]", "[]", "null", "true", "1e-3", "{h:1}", '["i"]', "''", "j/k.l"]
FORMS = ["{}", "choice({})", "sort({})", "shuffle({})", "tag(t,{})", "tag(t,choice({}))", "str({})"]


@MANY
@given(st.integers(0, 2**64))
def test_members_that_differ_have_folders_that_differ(seed: int) -> None:
    chance = Random(seed)
    one, other = (["".join(chance.choices(WORDS, k=3)) for _ in range(chance.randint(1, 3))] for _ in range(2))
    names = [folder_name(words) for words in (one, other)]
    assert (names[0] == names[1]) == (",".join(one) == ",".join(other))
    for name in names:
        assert len(name.encode()) < 255 and "/" not in name and "\0" not in name and name not in (".", "..")


@MANY
@given(st.integers(0, 2**64))
def test_there_are_as_many_values_as_hydra_makes_members(seed: int) -> None:
    chance = Random(seed)
    values = chance.sample(VALUES, chance.randint(2, 6))
    try:
        override = PARSER.parse_override(f"lora.r={chance.choice(FORMS).format(','.join(values))}")
        members = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override]
    except (HydraException, TypeError):
        return  # not a form of the grammar, or one that cannot be sorted
    assert len(values_of(override)) == len(members)


PARSER = OverridesParser.create()


def test_what_is_mistyped_is_answered_once() -> None:
    assert list(check_overrides(["lora.r", "=", "8"], RunConfig)) == ["write key=value without spaces around the ="]
    (line,) = check_overrides(["sweep=multirun/x"], EvaluateConfig)
    assert line == "sweep=multirun/x: medtune.train resumes a sweep so; here name it with run=FOLDER"


def test_what_only_a_sweep_has_asks_for_one() -> None:
    assert needs_sweep(["lora.r=8", "hydra.launcher.width=2"]) == "hydra.launcher.width=2"
    assert needs_sweep(["experiment=lora_rank", "hydra.launcher.width=2"]) is None
    assert needs_sweep(["lora.r=8", "hydra.run.dir=x"]) is None
