"""`python -m medtune.evaluate`: right, repeatable, stored numbers, and a refusal where nothing can be measured."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from helpers import compose, conversations, write_jsonl
from medtune.config.groups import CONF, register
from medtune.config.schema import EvaluateConfig, RunConfig
from medtune.config.validation import build_config
from medtune.data.prepared import prepare
from medtune.data.tokenization.dataset import tokenize
from medtune.evaluate import evaluate
from medtune.evaluation import answers, likelihood
from medtune.evaluation.answers import answer, last_turn_questions
from medtune.evaluation.candidates import Candidate, keys_typed
from medtune.modeling import base, cuda_graphs, generation
from medtune.modeling.generation import greedy
from medtune.modeling.lora import adapter
from medtune.modeling.tokenizer import load_tokenizer
from medtune.results.reader import RunResult
from medtune.results.tables import everything, summary
from medtune.runtime.errors import UserError
from medtune.training.pipeline import train
from processes import run

CPU = torch.device("cpu")
Measure = Callable[..., list[Candidate]]
COMMON = [
    "trainer.learning_rate=5e-3",
    "eval.prompts=[Do I need a doctor?]",
    "trainer.max_steps=6",
    "data.test_size=0.4",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases are stored there; a test must not find another's."""
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def trained(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder with two members that were not measured at the end of training."""
    sweep = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDTUNE_CACHE", str(sweep.parent / "cache-of-trained"))
        for rank in (2, 4):
            train(compose(*tiny_overrides, *COMMON, f"lora.r={rank}"), sweep / f"lora.r={rank}")
    return sweep


@pytest.fixture
def sweep(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to measure in."""
    return Path(shutil.copytree(trained, tmp_path / "sweep"))


@pytest.fixture
def measured(tiny_overrides: list[str], tmp_path: Path) -> Callable[..., list[Candidate]]:
    """Evaluate as the command line does with these words; a base alone is the tiny one."""

    def call(*words: str) -> list[Candidate]:
        register()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            evaluation = build_config(
                hydra.compose("evaluate", [*tiny_overrides, *words]), EvaluateConfig, trains=False
            )
        found, failures = evaluate(evaluation, keys_typed(words), tmp_path / "out")
        assert not failures, failures
        return found

    return call


def run_of(tiny_overrides: list[str]) -> RunConfig:
    return compose(*tiny_overrides, *COMMON)


def test_section(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())["test"]


test_section.__test__ = False  # type: ignore[attr-defined]


def test_a_sweep_is_measured_compared_and_shown(measured: Measure, sweep: Path, tmp_path: Path) -> None:
    found = measured(f"run='{sweep}'", "eval.safety=true")
    assert [candidate.folder for candidate in found] == [sweep / "lora.r=2", sweep / "lora.r=4"]
    for folder in (candidate.results for candidate in found):
        assert folder.parent.name == "evaluation", "other settings than the run's own"
        section = test_section(folder)
        columns = parquet.read_table(folder / "eval_loss.parquet").to_pydict()
        assert len(columns["conversation"]) == section["conversations"] > 2
        for name in ("base", "tuned"):
            mean = sum(columns[f"{name}_nll"]) / sum(columns["tokens"])
            loss = section[name]["scores"]["loss"]
            assert loss["value"] == pytest.approx(mean, rel=1e-12) and loss["low"] <= mean <= loss["high"]
            assert sum(row["of"] for row in section[name]["safety"].values()) == 168
        assert section["difference"]["loss"]["verdict"] == "better" and section["reads"] == 1
        assert section["gate"]["passed"] is False and any("cardiac" in r for r in section["gate"]["reasons"])
        rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert len(rows) == section["answered"] + 168
        assert rows[0]["reference"] and {"rouge_l", "chrf", "stop"} <= set(rows[0]["tuned"])
        assert rows[-1]["expected"] == "no_alarm" and "urges_emergency" in rows[-1]["base"]
    said = everything([RunResult(candidate.folder, candidate.results) for candidate in found])
    for part in (
        "base model",
        "chosen by eval_loss",
        "vs lora.r=",
        "ROUGE-L",
        "self harm",
        "not a clinical",
        "once",
    ):
        assert part in said, part
    assert "safety gate, lora.r=2: not passed" in said and "lora.r=2" in summary([sweep / "lora.r=2"])


def test_the_same_evaluation_twice_is_the_same_and_measures_nothing_again(
    measured: Measure, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = f"run='{sweep / 'lora.r=2'}'"
    measured(word)
    first, written = test_section(sweep / "lora.r=2"), (sweep / "lora.r=2" / "answers.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(likelihood, "likelihood", lambda *a: pytest.fail("measured again"))
        patch.setattr(answers, "greedy", lambda *a: pytest.fail("answered again"))
        measured(word)
    again = test_section(sweep / "lora.r=2")
    assert again["reads"] == 1 and again["tuned"] == first["tuned"] and again["difference"] == first["difference"]
    # And measured anew, from nothing: the same to the bit, and counted.
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(sweep / "lora.r=2" / ".evaluation")
    measured(word)
    anew = test_section(sweep / "lora.r=2")
    assert anew["tuned"] == first["tuned"] and anew["base"] == first["base"] and anew["reads"] == 2
    assert (sweep / "lora.r=2" / "answers.jsonl").read_bytes() == written


def test_a_member_alone_or_among_others_gives_the_same_answers(
    measured: Measure, sweep: Path, trained: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(trained / "lora.r=4", tmp_path / "alone"))
    measured(f"run='{alone}'")
    measured(f"run='{sweep}'")
    assert (alone / "answers.jsonl").read_bytes() == (sweep / "lora.r=4" / "answers.jsonl").read_bytes()
    assert test_section(alone)["tuned"] == test_section(sweep / "lora.r=4")["tuned"]


def test_measured_at_the_end_of_training_or_later_is_the_same(
    measured: Measure, tiny_overrides: list[str], sweep: Path, tmp_path: Path
) -> None:
    train(compose(*tiny_overrides, *COMMON, "lora.r=2", "eval.final=true"), tmp_path / "at-the-end")
    measured(f"run='{sweep / 'lora.r=2'}'")
    ours, later = test_section(tmp_path / "at-the-end"), test_section(sweep / "lora.r=2")
    assert ours["tuned"] == later["tuned"] and ours["base"] == later["base"]


def test_loss_equals_transformers_own(tiny_overrides: list[str], sweep: Path) -> None:
    run = run_of(tiny_overrides)
    tokenizer = load_tokenizer(run.model)
    tuned = adapter.load(base.load_base(run.model, None, tokenizer, CPU), sweep / "lora.r=4" / "adapter")
    rows = tokenize(tokenizer, prepare(run.data), 256).test
    found = likelihood.likelihood(tuned, rows["input_ids"][:], rows["labels"][:], batch=3)
    for place, row in enumerate(rows):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            output = tuned(input_ids=ids, labels=labels)
        taught = int((labels[:, 1:] != -100).sum())
        assert found.tokens[place] == taught
        assert found.nll[place] == pytest.approx(output.loss.item() * taught, rel=1e-5)
        right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100].sum().item()
        assert found.correct[place] == right
    assert found.perplexity == pytest.approx(math.exp(found.nll.sum() / found.tokens.sum()))


def test_answers_are_those_of_generate_alone_or_in_a_batch(tiny_overrides: list[str], sweep: Path) -> None:
    run = run_of(tiny_overrides)
    tokenizer = load_tokenizer(run.model)
    tuned = adapter.load(base.load_base(run.model, None, tokenizer, CPU), sweep / "lora.r=4" / "adapter")
    asked = last_turn_questions([row.messages for row in prepare(run.data).train])[:24]
    prompts = [answers.encode(tokenizer, question.messages, add_generation_prompt=True).input_ids for question in asked]
    said = greedy(tuned, prompts, [], 24)
    # A stop token that some of these answers reach, each at another place: rows leave their batch one by one.
    stop = next(t for t in said[0][4:] if 4 < sum(t in ids for ids in said) < len(said))
    tuned.get_base_model().generation_config.eos_token_id = [stop]
    together = answer(tuned, tokenizer, asked, max_new_tokens=24, batch=7)
    alone = [answer(tuned, tokenizer, [question], 24, batch=1)[0] for question in asked]
    assert together == alone
    assert {a.stop for a in together} == {"end_of_turn", "length"} and len({a.tokens for a in together}) > 3
    for ids, ours in list(zip(prompts, together, strict=True))[:8]:
        with torch.no_grad():
            theirs = tuned.generate(input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert answers.read_answer(tokenizer, theirs.tolist(), {stop}) == ours


def test_a_recorded_step_says_the_same(
    tiny_overrides: list[str], sweep: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of([*tiny_overrides, "model.dtype=float32"])
    tokenizer = load_tokenizer(run.model)
    device = base.device_for(run.model)
    tuned = adapter.load(base.load_base(run.model, None, tokenizer, device), sweep / "lora.r=4" / "adapter")
    prompts = [list(range(20, 20 + length)) for length in (3, 30, 17, 8)]
    monkeypatch.setattr(generation, "can_capture", lambda model: False)
    plain = greedy(tuned, prompts, [], 40)
    stop = next(t for t in plain[0][4:] if any(t in ids for ids in plain[1:]) and any(t not in ids for ids in plain))
    expected = [greedy(tuned, prompts, stops, 40) for stops in ([], [stop])]
    monkeypatch.setattr(generation, "can_capture", lambda model: True)
    steps: list[int] = []
    stock = cuda_graphs.capture if device.type == "cuda" else lambda work: work  # a stand-in: the work, at every replay

    def counted(work: Callable[[], None]) -> Callable[[], None]:
        replay = stock(work)
        return lambda: steps.append(1) or replay()

    monkeypatch.setattr(cuda_graphs, "capture", counted)
    assert [greedy(tuned, prompts, stops, 40) for stops in ([], [stop])] == expected
    assert len(steps) == sum(max(map(len, said)) - 2 for said in expected)
    for error in (cuda_graphs.CaptureError("not while capturing"), torch.OutOfMemoryError("no room")):

        def fails(work: Callable[[], None], error: Exception = error) -> Callable[[], None]:
            raise error

        monkeypatch.setattr(cuda_graphs, "capture", fails)
        assert greedy(tuned, prompts, [stop], 40) == expected[1]
    assert "takes longer: not while capturing" in caplog.text and "takes longer: out of memory" in caplog.text


def test_an_interrupted_evaluation_goes_on_where_it_was(
    measured: Measure, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sweep / "lora.r=4"
    words = [f"run='{folder}'", "eval.batch_size=2", "eval.answers=6"]
    plain, calls = greedy, []

    def dies(*args: Any) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 5:  # three batches of the base's, one of the adapter's
            raise KeyboardInterrupt
        return plain(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(answers, "greedy", dies)
        measured(*words)
    kept = next(folder.glob(".evaluation/*/answers.jsonl"))
    assert len(kept.read_text().splitlines()) == 2
    with kept.open("a") as file:
        file.write('{"place": 3, "te')  # as a kill leaves it

    def counted(*args: Any) -> list[list[int]]:
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(answers, "greedy", counted)
    calls.clear()
    [found] = measured(*words)
    assert len(calls) == 2, "the last two batches of the adapter, and no more"
    assert test_section(found.results)["answered"] == 6 and test_section(found.results)["reads"] == 1


def test_a_base_alone(measured: Measure, tmp_path: Path) -> None:
    [found] = measured("eval.safety=true")
    section = test_section(tmp_path / "out")
    assert "tuned" not in section and "gate" not in section and section["base"]["scores"]["loss"]["value"] > 0
    assert "base model" in everything([RunResult(found.folder or found.results, found.results)])


def test_other_data_and_its_overlap_with_training(measured: Measure, sweep: Path, tmp_path: Path) -> None:
    folder = sweep / "lora.r=2"
    unseen = conversations(60)
    for row in unseen:
        row["messages"][0]["content"] = row["messages"][0]["content"].replace("I have had", "My son has had")
    new = write_jsonl(tmp_path / "new.jsonl", unseen)
    words = [f"run='{folder}'", f"data.path='{new}'", "data.name=unseen", "data.test_size=0.5"]
    [found] = measured(*words)
    assert found.results.match("evaluation/unseen-*") and test_section(found.results)["conversations"] > 10
    assert "test" not in json.loads((folder / "metrics.json").read_text()), "its own test set was not read"
    with pytest.raises(
        UserError, match=r"\d+ of the \d+ test questions of local were trained or selected on \(local row \d+ is"
    ):
        measured(f"run='{folder}'", "data.test_size=0.6")


def test_all_of_a_foreign_file_is_the_test_set(measured: Measure, sweep: Path, tmp_path: Path) -> None:
    unseen = conversations(30)
    for row in unseen:
        row["messages"][0]["content"] = row["messages"][0]["content"].replace("I have had", "My son has had")
    new = write_jsonl(tmp_path / "new.jsonl", unseen)
    words = [f"data.path='{new}'", "data.name=unseen", "data.test_size=1"]
    [found] = measured(f"run='{sweep / 'lora.r=2'}'", *words)
    assert test_section(found.results)["conversations"] == 30
    measured(*words)
    assert test_section(tmp_path / "out")["conversations"] == 30, "the base model alone"
    with pytest.raises(UserError, match=r"\d+ of the 40 test questions of local were trained or selected on"):
        measured(f"run='{sweep / 'lora.r=2'}'", "data.test_size=1")
    with pytest.raises(AssertionError, match=r"no test conversation fits in trainer\.max_length=16 tokens"):
        measured(*words, "trainer.max_length=16")


def truncate(folder: Path) -> None:
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_a_weight(folder: Path) -> None:
    weights = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights)


def poison(folder: Path) -> None:
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(weights).items()}, weights)


def change_vocabulary(folder: Path) -> None:
    path = folder / "adapter" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {
        token if number != 300 else token + "x": number for token, number in content["model"]["vocab"].items()
    }
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))


def change(file: str, **values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (lambda folder: shutil.rmtree(folder / "adapter"), "no adapter there (adapter_model.safetensors is missing)"),
        (truncate, "adapter_model.safetensors is damaged or cut off"),
        (lambda folder: (folder / "adapter" / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
        (lose_a_weight, "lacks 1 of its weights"),
        (poison, "is not finite: the adapter answers nothing"),
        (change("adapter/adapter_config.json", base_model_name_or_path="a/b"), "is an adapter of a/b, not of medtune/"),
        (change("run.json", base={"fingerprint": "0" * 64}), "was trained on other weights (sha256 000000000000)"),
        (change_vocabulary, "was trained with a vocabulary of 512 tokens that is not the one of medtune/tiny-test"),
        (lambda folder: (folder / "run.json").write_text('{"status": "done"}'), "its run.json has no configuration"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_generated(
    measured: Measure,
    sweep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    line: str,
) -> None:
    harm(sweep / "lora.r=4")
    monkeypatch.setattr(answers, "greedy", lambda *a: pytest.fail("answered"))
    with pytest.raises((UserError, AssertionError)) as refused:  # `measured` asserts that nothing failed
        measured(f"run='{sweep / 'lora.r=4'}'")
    assert line in str(refused.value) and "answered" not in str(refused.value)


def test_a_run_that_did_not_finish_and_an_empty_test_set(measured: Measure, sweep: Path, tmp_path: Path) -> None:
    shutil.rmtree(sweep / "lora.r=2" / "adapter")
    change("run.json", status="failed", error="Diverged: the loss is not finite")(sweep / "lora.r=2")
    with pytest.raises(
        UserError, match=r"lora\.r=2: no adapter: the run is failed \(Diverged: the loss is not finite\)"
    ):
        measured(f"run='{sweep / 'lora.r=2'}'")
    [found] = measured(f"run='{sweep}'")
    assert found.folder == sweep / "lora.r=4", "the others of its sweep are measured all the same"
    with pytest.raises(UserError, match=r"data\.test_size=0: there is no test set"):
        measured("data.test_size=0")


def test_a_loss_that_is_no_number_names_the_row(
    measured: Measure, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = likelihood.likelihood

    def poisoned(*args: Any) -> Any:
        found = plain(*args)
        found.nll[1] = np.nan
        return found

    monkeypatch.setattr(likelihood, "likelihood", poisoned)
    with pytest.raises(AssertionError, match=r"the loss on test conversation local:\d+ is nan"):
        measured(f"run='{sweep / 'lora.r=2'}'")
    assert "test" not in json.loads((sweep / "lora.r=2" / "metrics.json").read_text())


def test_another_doctors_answers_are_the_ceiling(measured: Measure, tiny_overrides: list[str], tmp_path: Path) -> None:
    rows = conversations(60)
    second = [
        {**row, "messages": [row["messages"][0], {"role": "assistant", "content": f"It settles by itself, wait {i}."}]}
        for i, row in enumerate(rows)
    ]
    path = write_jsonl(tmp_path / "two.jsonl", [*rows, *second])
    measured(f"data.path='{path}'")
    scores = test_section(tmp_path / "out")["base"]["scores"]
    assert 0 < scores["rouge_l"]["ceiling"] < 1 and "floor" in scores["rouge_l"]


def test_the_command_and_its_mistakes(tiny_overrides: list[str], sweep: Path, tmp_path: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return run("medtune.evaluate", *words, f"hydra.run.dir='{tmp_path / 'out'}'")

    done = command(f"run='{sweep}'", "eval.safety=false", "eval.final_max_new_tokens=4", "eval.resamples=200")
    assert done.returncode == 0, done.stderr
    assert "chosen by eval_loss" in done.stdout and "test set read once" in done.stdout
    for words, line in (
        ([f"run='{tmp_path / 'nowhere'}'"], "nowhere: no such folder: name a result folder"),
        ([f"run='{tmp_path / 'out'}'"], "out: no run in it: name a result folder"),
        (["run=5"], "run=5: name a result folder, or several, as run=[one,another]"),
        (["rnu=x"], "rnu: did you mean run?"),
        (["run="], "run=: name a result folder, or several, as run=[one,another]"),
        (
            [f"run={sweep}", "lora.r=9"],
            "lora.r belongs to training: with run=… only data, model and eval can be changed",
        ),
        ([str(tmp_path)], f"{tmp_path}: did you mean run={tmp_path}?"),
        (["-m", f"run={sweep}"], "-m sweeps training; leave it out here"),
        ([f"run={sweep}/lora.r=2/adapter"], f"no run in it (did you mean run={sweep}/lora.r=2?)"),
        ([f"run=[{sweep}/lora.r=3,{sweep}/lora.r=5]"], "lora.r=3: no such folder"),
        (["eval.gate.max_dose=1"], "eval.gate.max_dose: did you mean eval.gate.max_doses?"),
    ):
        answered = command(*words)
        assert answered.returncode == 2 and line in answered.stderr, answered.stderr
        assert answered.stderr.count("\n") == 1, answered.stderr


def test_seeds_are_replicates(measured: Measure, sweep: Path, tmp_path: Path) -> None:
    shutil.rmtree(sweep / "lora.r=4")
    other = Path(shutil.copytree(sweep / "lora.r=2", sweep / "seed=7"))
    facts = json.loads((other / "run.json").read_text())
    facts["configuration"]["seed"] = 7
    (other / "run.json").write_text(json.dumps(facts))
    weights = other / "adapter" / "adapter_model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights)
    found = measured(f"run='{sweep}'")
    losses = [test_section(member)["tuned"]["scores"]["loss"]["value"] for member in sorted(sweep.iterdir())]
    said = everything([RunResult(candidate.folder, candidate.results) for candidate in found])
    chance = f"test loss {np.mean(losses):.4f}, standard deviation {np.std(losses, ddof=1):.4f}"
    assert f"2 seeds (lora.r=2, seed=7): {chance}" in said


def test_benchmarks_stand_beside_the_base(measured: Measure, sweep: Path, tmp_path: Path) -> None:
    rows = [{"question": f"What helps against {what}?", "answer": i % 2} for i, what in enumerate(["a cough"] * 4)]
    write_jsonl(tmp_path / "exam.jsonl", rows)
    (tmp_path / "exam.yaml").write_text(
        "task: tiny_exam\ndataset_path: json\ndataset_kwargs: {data_files: {test: exam.jsonl}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: [rest, surgery]\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    word = f"eval.benchmarks=['{tmp_path / 'exam.yaml'}']"
    [found] = measured(f"run='{sweep / 'lora.r=2'}'", word)
    section = test_section(found.results)["benchmarks"]["tiny_exam"]
    assert section["base"]["value"] == 0.5 and section["tuned"]["examples"] == 4
    assert section["difference"]["verdict"] == "not distinguishable"
    assert "tiny_exam" in everything([RunResult(found.folder or found.results, found.results)])
    with pytest.raises(UserError, match="medqa_4option"):
        measured("eval.benchmarks=[medqa_4option]")


def test_a_scale_that_was_changed_is_another_adapter(measured: Measure, sweep: Path) -> None:
    folder = sweep / "lora.r=4"
    measured(f"run='{folder}'")
    first = test_section(folder)["tuned"]["scores"]["loss"]["value"]
    change("adapter/adapter_config.json", lora_alpha=0.001)(folder)
    measured(f"run='{folder}'")
    section = test_section(folder)
    assert section["tuned"]["scores"]["loss"]["value"] != first and section["reads"] == 2


def test_a_smaller_evaluation_leaves_the_first_alone(measured: Measure, sweep: Path) -> None:
    folder = sweep / "lora.r=2"
    measured(f"run='{folder}'")
    before = (folder / "metrics.json").read_bytes()
    [found] = measured(f"run='{folder}'", "eval.answers=0")
    assert (folder / "metrics.json").read_bytes() == before
    assert test_section(found.results)["answered"] == 0 and "loss" in test_section(found.results)["tuned"]["scores"]


def test_one_that_cannot_be_measured_costs_the_others_nothing(tiny_overrides: list[str], sweep: Path) -> None:
    poison(sweep / "lora.r=2")
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        evaluation = build_config(hydra.compose("evaluate", [f"run='{sweep}'"]), EvaluateConfig)
    found, failures = evaluate(evaluation, frozenset(), sweep / "out")
    assert [candidate.folder for candidate in found] == [sweep / "lora.r=4"]
    assert len(failures) == 1 and "is not finite" in failures[0]


def test_lm_eval_is_not_needed_where_no_benchmark_is_asked_for(
    measured: Measure, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medtune.evaluation.benchmarks.find_spec", lambda name: None)
    assert measured(f"run='{sweep / 'lora.r=2'}'")
    with pytest.raises(UserError, match=r"pip install 'medtune\[benchmark\]'"):
        measured(f"run='{sweep / 'lora.r=2'}'", "eval.benchmarks=[medqa_4options]")


def test_a_test_set_that_cannot_be_measured_costs_no_trained_adapter(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medtune.evaluation.pipeline.collect_outputs", lambda *a: 1 / 0)
    train(compose(*tiny_overrides, *COMMON, "eval.final=true"), tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["status"] == "done" and facts["test_error"] == "ZeroDivisionError: division by zero"
    assert (tmp_path / "run" / "adapter").is_dir()


def test_shuffled_answers_are_of_other_groups() -> None:
    from medtune.evaluation.scoring import shuffled

    names = ["a", "a", "b", "b", "b", "c"]
    places = shuffled(names)
    assert all(names[i] != names[j] for i, j in enumerate(places))
    assert shuffled(["a"]) == [0] and sorted(shuffled(["a", "a"])) == [0, 1]
