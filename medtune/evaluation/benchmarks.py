"""Tasks of lm-evaluation-harness + a model in memory -> accuracy on standard questions, right or wrong for each.

MedQA (`medqa_4options`) and MedMCQA (`medmcqa`) ask for medical knowledge; `hellaswag` or `arc_easy` shows what an
adapter forgot. Any other task of the package can be named, or the YAML file of one's own, which is how PubMedQA is to
be had: `pubmedqa` of 0.4.13 names a data set that datasets 4 and later refuse (lm-evaluation-harness issue 3645).
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/new_task_guide.md

Questions are put as the package puts them, without a chat template: published figures of multiple-choice tasks are
mostly taken so, and base and adapter are asked the same.
"""

import contextlib
import difflib
import io
import logging
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from medtune.runtime.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEED = 1234  # lm-eval's own default for drawing few-shot examples
NAME = re.compile(rb"""^["']?task["']? *: +["']?([^\s"'#\[]+)""", re.MULTILINE)


@dataclass
class Benchmark:
    """What a model scored in a task: `value`, the mean of `scores`, and its standard error (None for one example).

    `scores`: of each example, in the task's order, 1 where the model was right and 0 where it was wrong; `doc_ids`: its
    place in the task's data, the same for every model, so that two models are compared example by example; `metric`:
    which of the task's it is (`main_metric`); `version`: the task's own, None where it states none.
    """

    metric: str
    value: float
    stderr: float | None
    version: str | None
    doc_ids: list[int]
    scores: list[float]

    @property
    def examples(self) -> int:
        """How many examples were scored."""
        return len(self.scores)


def run_benchmarks(
    model: "PeftModel | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    batch_size: int,
    limit: int | None = None,
) -> dict[str, Benchmark]:
    """Puts the questions of `tasks` (names, or YAML files) to a model, and returns what it scored, by the task's name.

    The adapter answers if it is attached; for the base alone call this within `model.disable_adapter()`. `batch_size`:
    rows per forward pass, each with its logits over the vocabulary in float32 (Llama 3: half a megabyte a token);
    `limit`: only the first so many examples of each task. Neither weights nor training mode change; Python's, NumPy's
    and PyTorch's random generators are seeded. Raises `UserError` as `load_tasks` does.
    """
    loaded = load_tasks(tasks)
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    training = model.training
    # Some of its progress bars cannot be turned off: they are for a terminal only.
    with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
        # The log-likelihoods of an answer's tokens are added up: bfloat16, the default, would round a long answer's to
        # a quarter of a nat, and equal sums go to the first choice.
        asked = HFLM(model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        logging.getLogger("lm_eval").setLevel(logging.WARNING)  # from here on it speaks of the questions
        # Not `simple_evaluate`, which looks for a git repository and lists the machine's packages every time.
        results = evaluate(lm=asked, task_dict={"tasks": loaded}, limit=limit, bootstrap_iters=0)
    model.train(training)
    return {name: summarize(task, results["samples"][name]) for name, task in loaded.items()}


def summarize(task: "Task", samples: Sequence[dict[str, Any]]) -> Benchmark:
    """Returns the benchmark that lm-eval's log of a task's examples holds; of several answer filters the first
    counts.
    """
    from lm_eval.api.metrics import mean, mean_stderr

    metric = main_metric(task)
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    scores = [float(sample[metric]) for sample in first]
    return Benchmark(
        metric,
        value=mean(scores),
        stderr=mean_stderr(scores) if len(scores) > 1 else None,
        version=None if task.VERSION == "Yaml" else str(task.VERSION),
        doc_ids=[sample["doc_id"] for sample in first],
        scores=scores,
    )


def main_metric(task: "Task") -> str:
    """Returns the first metric of a task that is a mean over its examples, higher being better. Else `UserError`."""
    from lm_eval.api.metrics import mean

    for metric, aggregate in task.aggregation().items():
        if aggregate is mean and task.higher_is_better()[metric]:
            return metric
    raise UserError(
        f"{task.task_name}: none of its metrics is a mean over the examples, so two models cannot be paired"
    )


def load_tasks(tasks: Sequence[str]) -> "dict[str, Task]":
    """Loads tasks and their data, which come from the Hugging Face Hub unless a task says otherwise.

    Call it before loading a model where the data may not be there yet. Raises `UserError` as `require_benchmarks` does,
    and where data cannot be had, a YAML file does not describe a task, or a task cannot be scored as a `Benchmark`.
    """
    require_benchmarks(tasks)
    loaded: dict[str, Task] = {}
    for spec in tasks:
        task = load_task(spec)
        if task.task_name in loaded:
            raise UserError(f"{spec}: another benchmark of this run is called {task.task_name} too")
        loaded[task.task_name] = task
    return loaded


def load_task(spec: str) -> "Task":
    """Loads one task, its few-shot examples drawn with a fixed seed. Raises `UserError` as `load_tasks` does."""
    from lm_eval.tasks import TaskManager
    from transformers import set_seed

    # It warns of every default that a task's YAML leaves to it.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = task_file(spec)
    set_seed(SEED)
    try:
        # From its own folder: a local task names its data files relative to itself.
        with contextlib.chdir(path.parent):
            (task,) = TaskManager(include_defaults=False).load([path.name])["tasks"].values()
        wrong = [] if spec in packaged_tasks() else unanswerable(task)
    except ConnectionError as error:
        raise UserError(
            f"{spec}: its data cannot be fetched from the Hugging Face Hub: check the network, or load it once where "
            "there is one and copy the Hub's cache (HF_HOME)"
        ) from error
    except Exception as error:  # a task is a program of its author: anything may go wrong in it
        cause = error.__cause__ or error
        raise UserError(f"{spec}: cannot be loaded: {type(cause).__name__}: {one_line(cause)}") from error
    if wrong:
        raise UserError(
            f"{spec}: the right answer of {len(wrong)} examples is none of their choices, first of {wrong[0]}"
        )
    if task.get_config("unsafe_code"):
        raise UserError(f"{spec}: runs code that the model writes, which is not done here")
    main_metric(task)
    task.set_fewshot_seed(SEED)
    return task


def unanswerable(task: "Task") -> list[int]:
    """Returns which examples of a multiple-choice task have a right answer that is none of their choices.

    lm-eval warns of each and counts it as wrong: a misspelt column would be an accuracy of zero.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return []
    found = []
    for place, example in enumerate(task.eval_docs):
        choices, answer = task.doc_to_choice(example), task.doc_to_target(example)
        answers = answer if isinstance(answer, list) else [answer]
        if not all(right in range(len(choices)) or right in choices for right in answers):
            found.append(place)
    return found


def require_benchmarks(tasks: Sequence[str]) -> None:
    """Checks that benchmarks can be run: lm-eval is installed, and every task is known. Nothing heavy is imported.

    Raises `UserError` with a line for each that is not.
    """
    if tasks and find_spec("lm_eval") is None:
        raise UserError("benchmarks need lm-evaluation-harness: pip install 'medtune[benchmark]'")
    problems: list[str] = []
    for spec in tasks:
        try:
            task_file(spec)
        except UserError as refusal:
            problems += refusal.lines
    if problems:
        raise UserError(*problems)


def task_file(spec: str) -> Path:
    """Returns the YAML file of a task, given by that file's path or by the name of a task of the package.

    Raises `UserError` if there is no such task, or the file is no task's.
    """
    if not spec.endswith((".yaml", ".yml")):
        known = packaged_tasks()
        if spec not in known:
            longer = sorted(name for name in known if name.startswith(spec))
            near = longer or difflib.get_close_matches(spec, known, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"{spec} is no task of lm-eval (a group's tasks are named one by one){hint}")
        return known[spec]
    path = Path(spec).expanduser().absolute()
    try:
        # Composed, not constructed: tags as `!function` name Python code of the task's author.
        document = yaml.compose(path.read_bytes())
    except OSError as error:
        raise UserError(f"{spec}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{spec}: broken YAML: {one_line(error)}") from error
    keys = {key.value for key, _ in document.value} if isinstance(document, yaml.MappingNode) else set()
    if "task" not in keys or "group" in keys:
        raise UserError(f"{spec}: not a task of lm-eval: it needs a line `task: NAME`, and no `group`")
    return path


@lru_cache
def packaged_tasks() -> dict[str, Path]:
    """Names of lm-eval's own tasks, and their YAML files.

    Only the line with the name is read: lm-eval's own index parses 14,000 files, for which it takes 14 seconds.
    """
    package = find_spec("lm_eval")
    assert package and package.submodule_search_locations
    names: dict[str, Path] = {}
    # Sorted, as in the index: of two tasks with one name the first counts.
    for path in sorted(Path(package.submodule_search_locations[0], "tasks").rglob("*.yaml"), key=Path.as_posix):
        for name in NAME.findall(path.read_bytes()):
            names.setdefault(name.decode(), path)
    return names


def one_line(error: BaseException) -> str:
    """Returns what an error says, in one line that is not too long."""
    return textwrap.shorten(str(error), 300)
