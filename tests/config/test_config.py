"""Every YAML that ships composes; every mistake is one line in the user's words; nothing heavy is imported for it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from helpers import compose
from medtune.config.groups import CONF, EXPERIMENTS, group_names, group_options, register
from medtune.config.keys import all_keys, dataclass_of, find_key
from medtune.config.reference import COMMANDS
from medtune.config.resolvers import folder_name
from medtune.config.schema import PrepareConfig, RunConfig
from medtune.config.validation import build_config
from medtune.runtime.errors import UserError
from processes import run

ROOT = Path(__file__).parents[2]
CHOICES = [(group, option) for group in group_names() for option in group_options(group)]


def test_every_folder_and_file_is_covered() -> None:
    commands = set(CONF.glob("*.yaml"))
    assert {path.stem for path in commands} == {*COMMANDS, "launch"}  # a part of train.yaml
    files = {path for folder in (CONF, EXPERIMENTS) for path in folder.rglob("*.yaml")} - commands
    assert len(files) == len(CHOICES) >= 20
    assert {group for group, _ in CHOICES} == {
        "data", "data/preparation", "model", "quantization", "lora", "trainer", "eval", "wandb", "experiment",
    }  # fmt: skip


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_yaml_composes(group: str, option: str) -> None:
    needed = [f"data.path='{__file__}'"] if (group, option) == ("data", "local") else []
    run = compose(f"{group}={option}", *needed)
    assert isinstance(run, RunConfig)


@pytest.mark.parametrize(("command", "schema"), COMMANDS.items())
def test_the_configuration_of_every_command_composes(command: str, schema: type[RunConfig]) -> None:
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        assert type(build_config(hydra.compose(command), schema)) is schema


@pytest.mark.parametrize("launcher", [None, "basic"])
def test_an_experiment_may_choose_the_launcher(launcher: str | None) -> None:
    register()
    chosen = {"defaults": [{"override /hydra/launcher": launcher}]} if launcher else {}
    ConfigStore.instance().store(group="experiment", name="mine", package="_global_", node=OmegaConf.create(chosen))
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("train", ["experiment=mine"], return_hydra_config=True)
    assert composed.hydra.runtime.choices["hydra/launcher"] == (launcher or "shared_base")


def test_every_experiment_names_itself_and_its_command() -> None:
    for path in EXPERIMENTS.glob("*.yaml"):
        question, command_line = path.read_text().splitlines()[:2]
        assert question.startswith("# ") and f"experiment={path.stem}" in command_line
        assert compose(f"experiment={path.stem}").name == path.stem


def test_every_key_is_documented_and_every_number_has_a_unit_and_a_range() -> None:
    leaves = [path for path in all_keys(PrepareConfig) if not dataclass_of(find_key(path, PrepareConfig)[2])]
    leaves.remove("data.members")  # a mapping of groups
    assert len(leaves) > 40
    for path in leaves:
        _, entry, kind = find_key(path, PrepareConfig)
        assert entry.metadata["doc"], path
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        assert default in ("???", None, []), f"{path} has a second default, besides conf/"
        if kind in (int, float, int | None, float | None):
            assert entry.metadata["unit"], path
            assert any(bound is not None for bound in entry.metadata["bounds"].values()), path


def test_sizes_of_a_random_model_can_be_changed_one_by_one() -> None:
    words = ["model=tiny_random", "model.architecture.num_hidden_layers=3", "--cfg", "job"]
    answer = run("medtune.train", *words)
    assert answer.returncode == 0 and "num_hidden_layers: 3\n" in answer.stdout


def test_alpha_follows_a_swept_rank() -> None:
    for r in (4, 16, 64):
        lora = compose(f"lora.r={r}").lora
        assert lora.lora_alpha / lora.r == 2
    assert compose("lora.r=64", "lora.lora_alpha=16").lora.lora_alpha == 16


def test_the_8b_experiment_is_qlora_as_published() -> None:
    run = compose("experiment=llama3_8b")
    assert run.model.hub_id == "meta-llama/Meta-Llama-3-8B-Instruct" and run.model.needs_gpu
    assert run.quantization and run.quantization.type.name == "nf4" and run.quantization.double_quantization
    assert run.trainer.gradient_accumulation_steps > 1
    assert compose("quantization=none").quantization is None


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["eval.every=0"], "eval.every must be at least 1 (steps), not 0"),
        (["lora.lora_dropout=1"], "lora.lora_dropout must be at least 0 and below 1 (share), not 1.0"),
        (["trainer.learning_rate=nan"], "trainer.learning_rate must be a finite number, not nan"),
        (["++lora.rr=8"], "lora.rr: did you mean lora.r?"),
        (["++lora.alpha=8"], "lora.alpha: did you mean lora.lora_alpha?"),
        (["data=local"], "data=local needs a file: data.path=conversations.jsonl"),
        (["data.path=x.csv"], "the bundled consultations have their own file; for yours add data=local"),
        (["data=local", "data.path=nowhere.jsonl"], "data.path=nowhere.jsonl: no such file"),
        (
            ["data=local", f"data.path='{__file__}'", "data.columns.question=q"],
            "question and answer go together: name data.columns.answer=COLUMN too",
        ),
        (["data.columns.question=q"], "not both"),
        (["data.validation_size=0.6", "data.test_size=0.5"], "nothing is left to train on"),
        (["data.validation_size=20.5"], "up to 1 it is a share, from 2 on a whole number of conversations"),
        (["data.test_size=1.5"], "up to 1 it is a share, from 2 on a whole number of conversations"),
        (["data.validation_size=1"], "nothing is left to train on"),
        (["data.test_size=1"], "all of the data is the test set, which only medtune.evaluate takes"),
        (["data.test_size=1.0", "data.validation_size=20"], "all of the data is the test set"),
        (["data.group_pattern='('"], "data.group_pattern is no regular expression"),
        (["data.group_pattern=x"], "data.group_pattern must have one group in brackets"),
        (["data=mix", "data.path=x.csv"], "a mixture has no data of its own: data.members.NAME.path=FILE"),
        (["data=mix", "data.members.medquad.path=x.csv"], "data.members.medquad.path=x.csv: no such file"),
        (["data=mix", "data.members.medquad.weight=0"], "data.members.medquad.weight must be above 0"),
        (["data=mix", "data.members.medquad.name=icliniq"], "two sources are called icliniq"),
        (["model.weights=folder"], "model.weights=folder needs model.path=FOLDER"),
        (["model.path=x"], "model.path is only read with model.weights=folder"),
        (["model.weights=random"], "model.weights=random needs model.architecture"),
        (["model.pad_token='<|im_end|>'"], "is also a stop token"),
        (["model.stop_tokens=[]"], "no answer would ever end"),
        (["lora.target_modules=[]"], "nothing would train"),
        (["lora.target_modules=[q_proj,q_proj]"], "names a layer twice"),
        (["name=../../elsewhere"], "name=../../elsewhere: results go to a folder of this name"),
        (["name=''"], "name=: results go to a folder of this name"),
        (["data=local", "data.path=/proc"], "data.path=/proc: a folder, not a file"),
        (["quantization=int8", "quantization.double_quantization=true"], "works with nf4 and fp4 only"),
        (["eval.prompts=[]", "eval.held_out=0", "eval.red_flags=0"], "no answers to look at"),
        (["name=hf_abcdefghijklmnopqrstuvwxyz"], "looks like a secret"),
    ],
)
def test_values_and_combinations_that_cannot_work(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as refusal:
        compose(*overrides)
    assert line in str(refusal.value)
    assert len(refusal.value.lines) == 1


def test_all_problems_at_once() -> None:
    cfg = OmegaConf.create({"lora": {"r": 0, "ranks": 8}, "seed": "x", "wandb": {"mode": "sometimes"}})
    with pytest.raises(UserError) as refusal:
        build_config(cfg, RunConfig)
    text = str(refusal.value)
    for part in (
        "lora.ranks: did you mean",
        "lora.r must be at least 1",
        "seed must be a whole number, not 'x'",
        "wandb.mode must be one of offline, online, disabled, not 'sometimes'",
        "trainer has no value",
        "wandb.project has no value",
    ):
        assert part in text


def test_a_learning_rate_given_as_text_is_a_number_or_refused() -> None:
    assert compose("trainer.learning_rate='2e-4'").trainer.learning_rate == 2e-4
    answer = run("medtune.train", "trainer.learning_rate=fast")
    assert (answer.returncode, answer.stderr) == (2, "medtune: trainer.learning_rate must be a number, not 'fast'\n")


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["lora.rr=8"], ["lora.rr: did you mean lora.r?"]),
        (["learning_rte=1e-4"], ["learning_rte: did you mean trainer.learning_rate?"]),
        (["lora=atention"], ["lora=atention: did you mean lora=attention?"]),
        (["model=smollm"], ["model=smollm: did you mean model=smollm2_135m?"]),
        (["experiment=smok"], ["experiment=smok: did you mean experiment=smoke?"]),
        (["modle=llama3_8b"], ["modle: did you mean model?"]),
        (["hydra.launcher.widths=2", "-m"], ["hydra.launcher.widths: did you mean hydra.launcher.width?"]),
        (
            ["hydra.launcher.at_once=2", "-m"],
            ["hydra.launcher.at_once: no such key; hydra.launcher has width, processes"],
        ),
        (["lora.r"], ["lora.r: not of the form key=value; did you mean lora.r=…?"]),
        (["model.pad_token=<x>"], ["model.pad_token=<x>: not of the form key=value; quote the value twice"]),
        (["lora.r=8,16"], ["lora.r=8,16 has several values: add -m for a sweep, or brackets for a list"]),
        (["lora.r=16,0", "-m"], ["lora.r must be at least 1 (rank), not 0"]),
        (["lora=8"], ["lora=8: there is all_linear, attention"]),
        (["+lora.alpha=8"], ["lora.alpha: did you mean lora.lora_alpha?"]),
        (["data=local"], ["data=local needs a file: data.path=conversations.jsonl"]),
        (
            ["lora.r=4,8", "quantization=int8,nf4", "quantization.double_quantization=true", "-m"],
            [
                "lora.r=4,quantization=int8: quantization.double_quantization works with nf4 and fp4 only",
                "lora.r=8,quantization=int8: quantization.double_quantization works with nf4 and fp4 only",
            ],
        ),
        (
            ["-m", "lora.rr=8", "trainer.max_steps=x", "quantization=nf5", "lora.r=8,16"],
            [
                "lora.rr: did you mean lora.r?",
                "trainer.max_steps must be a whole number or null, not 'x'",
                "quantization=nf5: did you mean quantization=nf4?",
            ],
        ),
        (["lora.r=8,8", "-m"], ["two members are the same: lora.r=8 and lora.r=8"]),
        (["hydra.run.dir=/proc/nowhere/run"], ["choose another folder"]),
        (["quantization=null"], ["quantization=null: did you mean quantization=none?"]),
        (["seed=${nope}"], ["Interpolation key 'nope' not found"]),
        (["lora.r=${oc.env:UNSET_HERE}"], ["Environment variable 'UNSET_HERE' not found"]),
        (["model.architecture={hidden_size:3}"], ["model.architecture is null in what was chosen"]),
        (["lora.r=1,2", "-m", "--cfg", "job"], ["--cfg shows one run: leave -m out"]),
        (["~lora"], ["~lora: nothing can be taken out of a run"]),
        (["hydra/launcher=nowhere"], ["hydra/launcher=nowhere: there is basic, "]),
        (["hydra/launcher=packed"], ["hydra/launcher=packed: it is called hydra/launcher=shared_base now"]),
        (["lora.r="], ["lora.r must be a whole number, not ''"]),
        (["hydra.run.dirr=x"], ["hydra.run.dirr: did you mean hydra.run.dir?"]),
        (["LORA.R=8"], ["LORA.R: did you mean lora.r?"]),
        (["seed=99999999999"], ["seed must be at least 0 and at most 4294967295 (integer), not 99999999999"]),
        (
            ["lora.r=1,2", "hydra.sweeper.max_batch_size=1", "-m"],
            ["hydra.sweeper.max_batch_size: hydra.launcher says how many"],
        ),
    ],
)
def test_a_mistake_is_one_line_each_before_anything_runs(words: list[str], lines: list[str], tmp_path: Path) -> None:
    answer = run("medtune.train", *words, f"hydra.sweep.dir={tmp_path}/sweep")
    said = answer.stderr.splitlines()
    assert answer.returncode == 2
    assert len(said) == len(lines), answer.stderr
    for line, expected in zip(said, lines, strict=True):
        assert line.startswith("medtune: ") and expected in line
    assert "Traceback" not in answer.stderr + answer.stdout
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("lora:\n  rr: 8\n", "experiments/mine.yaml: lora.rr: did you mean lora.r?"),
        ("lora:\n  r: sixteen\n", "experiments/mine.yaml: lora.r must be a whole number, not 'sixteen'"),
        ("defaults:\n  - override /model: llama\n", "experiments/mine.yaml: model=llama: "),
        (
            "defaults:\n  - override /hydra/launcher: packed\n",
            "experiments/mine.yaml: hydra/launcher=packed: it is called hydra/launcher=shared_base now",
        ),
        ("lora: [\n", "experiments/mine.yaml is not valid YAML"),
    ],
)
def test_a_mistake_in_an_experiment_file_names_the_file(
    content: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    for folder in ("medtune", "conf", "experiments", "hydra_plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "experiments" / "mine.yaml").write_text(content)
    words = [sys.executable, "-m", "medtune.train", "experiment=mine"]
    answer = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"medtune: {line}") and answer.stderr.count("\n") == 1, answer.stderr


def test_composing_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['train', 'experiment=llama3_8b', '--cfg', 'job', '--resolve']\n"
        "from medtune.train import main\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'wandb'}\n"
        "try: main()\n"
        "finally: print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "meta-llama/Meta-Llama-3-8B-Instruct" in answer.stdout
    assert answer.stdout.splitlines()[-1] == "HEAVY []"


def test_help_shows_groups_and_keys() -> None:
    answer = run("medtune.train", "--help")
    assert answer.returncode == 0
    for part in ("fp4, int8, nf4*, none", "lora.lora_alpha=", "lora.r=16,32 -m", "  experiment "):
        assert part in answer.stdout


def test_folder_names_are_one_component_and_never_collide() -> None:
    names = [folder_name(words) for words in (["a=b/c"], ["a=b_c"], [f"x={'y' * 500}"], [f"x={'y' * 501}"], [])]
    assert len(set(names)) == len(names)
    assert all("/" not in name and 0 < len(name) < 200 for name in names)
    assert folder_name(["lora.r=16", "trainer.learning_rate=1e-4"]) == "lora.r=16,trainer.learning_rate=1e-4"


def test_schema_is_plain_values() -> None:
    run = compose()
    assert isinstance(run.lora.target_modules, list) and type(run.lora.target_modules) is list
    assert dataclasses.is_dataclass(run.data.columns)
