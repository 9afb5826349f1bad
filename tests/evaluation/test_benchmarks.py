"""Benchmarks of lm-evaluation-harness: what they say of a model, what they leave alone, and what they refuse."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from helpers import write_jsonl
from medtune.evaluation import benchmarks as benchmark
from medtune.evaluation.benchmarks import Benchmark, require_benchmarks, run_benchmarks
from medtune.modeling.frozen_base import fingerprint
from medtune.modeling.quantized import keep_gradients_after_evaluation
from medtune.runtime.errors import UserError

Write = Callable[..., str]

LETTERS = ["A", "B", "C", "D"]  # equal but for the last token: one forward pass serves all four
WORDS = ["today", "sleep", "water", "visit"]  # four or five tokens each
ROWS = [
    {"question": f"I have had {complaint} for {days} days. What should I do?", "label": label}
    for complaint, days, label in [
        ("chest pain", 1, 0),
        ("a cold", 2, 1),
        ("a headache", 3, 2),
        ("a rash", 14, 3),
        ("a sore knee", 20, 3),
        ("a stiff neck and fever", 1, 0),
        ("hiccups", 1, 2),
        ("a cough", 4, 1),
    ]
]
TASK = {
    "task": "triage",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Patient: {{question}}\nDoctor:",
    "doc_to_choice": LETTERS,
    "doc_to_target": "label",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    "metadata": {"version": 1.5},
}


@pytest.fixture
def write_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the YAML of a task, with the given keys changed, beside its eight questions."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(**changed: object) -> str:
        write_jsonl(tmp_path / "rows.jsonl", ROWS)
        path = tmp_path / f"{changed.get('task', 'triage')}.yaml"
        path.write_text(yaml.safe_dump({**TASK, **changed}))
        return str(path)

    return write


def tune(base: PreTrainedModel) -> PeftModel:
    """Attach an adapter that changes the base's answers."""
    torch.manual_seed(0)
    random = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(base, random)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def base(tiny: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tuned(tiny: Path) -> PeftModel:
    """The same base again, tuned."""
    return tune(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)).eval()


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, context: str, answer: str) -> float:
    """Sum of the log-probabilities of an answer's tokens, row by row and without padding."""
    asked, ids = tokenizer(context)["input_ids"], tokenizer(context + answer)["input_ids"]
    assert ids[: len(asked)] == asked
    log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probs[place - 1, ids[place]]) for place in range(len(asked), len(ids)))


def expected_scores(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, choices: list[str]) -> list[float]:
    """1 for each question whose right answer is the likeliest."""
    scores = []
    for row in ROWS:
        context = f"Patient: {row['question']}\nDoctor:"
        likelihoods = [log_likelihood(model, tokenizer, context, f" {choice}") for choice in choices]
        scores.append(float(likelihoods.index(max(likelihoods)) == row["label"]))
    return scores


def run(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *tasks: str, limit: int | None = None
) -> Benchmark:
    (found,) = run_benchmarks(model, tokenizer, tasks, batch_size=3, limit=limit).values()
    return found


@pytest.mark.parametrize("choices", [LETTERS, WORDS])
def test_right_is_what_the_model_finds_likeliest(
    tuned: PeftModel, tokenizer: PreTrainedTokenizerFast, write_task: Write, choices: list[str]
) -> None:
    scores = expected_scores(tuned.eval(), tokenizer, choices)
    found = run_benchmarks(tuned, tokenizer, [write_task(doc_to_choice=choices)], batch_size=3)
    accuracy = sum(scores) / 8
    assert 0 < accuracy < 1, "a test in which all are right or all are wrong shows little"
    assert found == {
        "triage": Benchmark(
            metric="acc",
            value=pytest.approx(accuracy),
            stderr=pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 7)),
            version="1.5",
            doc_ids=list(range(8)),
            scores=scores,
        )
    }


def test_adapter_against_base(
    base: PreTrainedModel, tuned: PeftModel, tokenizer: PreTrainedTokenizerFast, write_task: Write
) -> None:
    task = write_task()
    with_adapter = run(tuned, tokenizer, task)
    with tuned.disable_adapter():
        without = run(tuned, tokenizer, task)
    assert without == run(base, tokenizer, task)
    assert without.scores == expected_scores(base, tokenizer, LETTERS) != with_adapter.scores
    assert without.doc_ids == with_adapter.doc_ids
    assert run(tuned, tokenizer, task) == with_adapter, "the same again"


@pytest.mark.parametrize("training", [True, False])
def test_a_4_bit_model_its_tokenizer_and_the_folder_are_left_as_they_were(
    tiny: Path, tokenizer: PreTrainedTokenizerFast, write_task: Write, training: bool
) -> None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16, quantization_config=nf4)
    keep_gradients_after_evaluation(base)
    tuned = tune(base).train(training)
    before = fingerprint(tuned), tokenizer.padding_side, tokenizer.pad_token, Path.cwd()
    with_adapter = run(tuned, tokenizer, write_task(), limit=4)
    with tuned.disable_adapter():
        without = run(tuned, tokenizer, write_task(), limit=4)
    assert with_adapter.scores != without.scores
    assert all(module.training is training for module in tuned.modules())
    assert before == (fingerprint(tuned), tokenizer.padding_side, tokenizer.pad_token, Path.cwd())


def test_limit_takes_the_first_examples(
    tuned: PeftModel, tokenizer: PreTrainedTokenizerFast, write_task: Write
) -> None:
    task = write_task()
    whole, part, one = (run(tuned, tokenizer, task, limit=limit) for limit in (None, 3, 1))
    assert (part.doc_ids, part.scores, part.examples) == (whole.doc_ids[:3], whole.scores[:3], 3)
    assert one.stderr is None and one.scores == whole.scores[:1]


def test_one_begin_token(tuned: PeftModel, tiny: Path, write_task: Write) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    # As in Llama 3's own repository: the tokenizer puts the token in front of every text.
    tokenizer._tokenizer.post_processor = TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin])
    seen: list[torch.Tensor] = []
    hook = tuned.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run(tuned, tokenizer, write_task())
    hook.remove()
    assert seen and all((ids[:, 0] == begin[1]).all() for ids in seen)
    assert all((ids[:, 1:] != begin[1]).all() for ids in seen)


def test_generated_answers(tuned: PeftModel, tokenizer: PreTrainedTokenizerFast, write_task: Write) -> None:
    asked = tokenizer(f"Patient: {ROWS[0]['question']}\nDoctor:", return_tensors="pt")
    prompt = asked["input_ids"].shape[1]
    generated = tuned.eval().generate(**asked, max_new_tokens=4, do_sample=False)[0, prompt:]
    said = tokenizer.decode(generated, skip_special_tokens=True)
    task = write_task(
        task="said",
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target=said,
        generation_kwargs={"max_gen_toks": 4, "until": ["\n\n\n"], "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    found = run(tuned, tokenizer, task)
    assert found.metric == "exact_match" and found.scores[0] == 1.0 and found.examples == 8


def test_nothing_is_written_where_there_is_no_terminal(
    tuned: PeftModel, tokenizer: PreTrainedTokenizerFast, write_task: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    task = write_task()
    datasets.disable_progress_bars()  # as medtune.quiet does
    run(tuned, tokenizer, task)
    datasets.enable_progress_bars()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("medqa_4option", r"medqa_4option is no task of lm-eval .*: did you mean medqa_4options\?"),
        ("multimedqa", r"a group's tasks are named one by one"),
        ("nowhere.yaml", r"nowhere\.yaml: cannot be read: No such file or directory"),
    ],
)
def test_unknown_tasks(task: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as refusal:
        require_benchmarks([task])
    assert len(refusal.value.lines) == 1


def test_every_unknown_task_is_named_at_once(write_task: Write) -> None:
    with pytest.raises(UserError) as refusal:
        require_benchmarks(["medqa_4options", "medkwa", write_task(), "nowhere.yaml"])
    assert [line.split(maxsplit=1)[0] for line in refusal.value.lines] == ["medkwa", "nowhere.yaml:"]


def test_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'medtune\[benchmark\]'$"):
        require_benchmarks(["hellaswag"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("task: [triage\n", "broken YAML: while parsing a flow sequence"),
        ("- triage\n", "not a task of lm-eval: it needs a line `task: NAME`"),
        ("group: all\ntask: [hellaswag]\n", "not a task of lm-eval: .* and no `group`"),
        ("task: \x07\n", "broken YAML: "),
    ],
)
def test_files_that_are_no_tasks(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "triage.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=line) as refusal:
        require_benchmarks([str(path)])
    assert refusal.value.lines[0].startswith(f"{path}: ") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "cannot be loaded: FileNotFound.*gone.jsonl"),
        ({"test_split": "exam"}, "cannot be loaded: KeyError: 'exam'"),
        ({"doc_to_txt": "?"}, "cannot be loaded: TypeError: .*doc_to_txt"),
        ({"doc_to_text": "{{complaint}}"}, "cannot be loaded: UndefinedError: 'complaint' is undefined"),
        ({"dataset_path": "GBaker/MedQA-USMLE-4-options-hf", "dataset_kwargs": {}}, "cannot be fetched from the"),
        ({"doc_to_target": "lable"}, "the right answer of 8 examples is none of their choices, first of 0"),
        ({"doc_to_choice": ["A", "B", "C"]}, "the right answer of 2 examples is none of their choices, first of 3"),
        ({"unsafe_code": True}, "runs code that the model writes"),
        ({"metric_list": [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]}, "none of its metrics is"),
    ],
)
def test_tasks_that_cannot_be_had(
    tuned: PeftModel, tokenizer: PreTrainedTokenizerFast, write_task: Write, changed: dict[str, object], line: str
) -> None:
    with pytest.raises(UserError, match=line) as refusal:
        run(tuned, tokenizer, write_task(**changed))
    assert len(refusal.value.lines) == 1 and "\n" not in str(refusal.value)


def test_broken_data(tuned: PeftModel, tokenizer: PreTrainedTokenizerFast, write_task: Write, tmp_path: Path) -> None:
    task = write_task()
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n{")
    with pytest.raises(UserError, match=r"triage\.yaml: cannot be loaded: .*") as refusal:
        run(tuned, tokenizer, task)
    assert "\n" not in str(refusal.value)


def test_packaged_task_without_the_hub(tuned: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="medqa_4options: its data cannot be fetched from the Hugging Face Hub"):
        run(tuned, tokenizer, "medqa_4options")


def test_two_tasks_of_one_name(tuned: PeftModel, tokenizer: PreTrainedTokenizerFast, write_task: Write) -> None:
    task = write_task()
    with pytest.raises(UserError, match="another benchmark of this run is called triage too"):
        run_benchmarks(tuned, tokenizer, [task, task], batch_size=3)


@pytest.mark.slow
def test_names_are_those_of_the_packages_own_index() -> None:
    from lm_eval.tasks import TaskManager

    index = TaskManager()
    assert benchmark.packaged_tasks() == {name: index.task_index[name].yaml_path for name in index.all_subtasks}
