"""What a model makes of an evaluation set: losses and answers, stored as they come, so that nothing is lost.

The test set is read once for each model. Its outputs are stored under a name made of everything they depend on, where
the next evaluation of the same model finds them. An interrupted evaluation resumes at the batch where it stopped.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from medtune.config.schema import Eval
from medtune.data.tokenization.chat_template import encode, encode_contents
from medtune.data.tokenization.dataset import IGNORE_INDEX
from medtune.evaluation import answers, likelihood
from medtune.evaluation.answers import Answer, Question
from medtune.evaluation.eval_set import EvalSet
from medtune.evaluation.likelihood import Likelihood
from medtune.evaluation.output_cache import load_or_compute, stored_answers
from medtune.evaluation.subject import Subject
from medtune.runtime.files import read_json, read_jsonl, write_json

log = logging.getLogger(__name__)


class NotANumber(Exception):
    """A model whose loss on a row is not a number: its answers mean nothing."""


@dataclass
class ModelOutputs:
    """What a model makes of an evaluation set.

    `likelihood` of its rows; `answers` to its questions; `fluency`: the likelihood of the answers to the test questions
    under the base model. `seconds`: how long each part took when it was computed.
    """

    likelihood: Likelihood
    answers: list[Answer]
    fluency: Likelihood
    seconds: dict[str, float]


def collect_outputs(subject: Subject, eval_set: EvalSet, evaluation: Eval, store: Path, reads: Path) -> ModelOutputs:
    """Returns the loss of every row, an answer to every question, and the likelihood of the answers under the base.

    `store`: a folder for this model and evaluation set alone; what is in it already is not computed again. Its first
    use is recorded as a read of the test set in the file `reads`. Raises `NotANumber` when the loss of a row is not
    finite.
    """
    store.mkdir(parents=True, exist_ok=True)
    if not (store / "seconds.json").is_file():
        record_test_read(reads, eval_set)
        write_json(store / "seconds.json", {})
    seconds = read_json(store / "seconds.json")
    if not (store / "fluency.npz").is_file():
        counts = f"{len(eval_set.names)} test conversations, {len(eval_set.asked)} answers"
        log.info("evaluating the %s: %s", subject.title, counts)
    batch = evaluation.batch_size
    losses = load_or_compute(store / "loss.npz", lambda: finite_losses(subject, eval_set, batch), seconds)
    answered = answer_all(subject, eval_set, evaluation, store / "answers.jsonl", seconds)
    texts = [each.text for each in answered[: len(eval_set.answered)]]
    fluency = load_or_compute(
        store / "fluency.npz", lambda: score_under_base(subject, eval_set.tested, texts, batch), seconds
    )
    write_json(store / "seconds.json", seconds)
    return ModelOutputs(losses, answered, fluency, seconds)


def record_test_read(path: Path, eval_set: EvalSet) -> None:
    """Appends to the file `path` that the evaluation of a model on a test set begins."""
    row = {"began": datetime.now(UTC).isoformat(timespec="seconds"), "test_set": eval_set.test_set}
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def count_test_reads(path: Path, eval_set: EvalSet) -> int:
    """Returns how often the model that the file `path` belongs to was evaluated on this test set."""
    return sum(row["test_set"] == eval_set.test_set for row in read_jsonl(path))


def finite_losses(subject: Subject, eval_set: EvalSet, batch: int) -> Likelihood:
    """Returns the likelihood of the rows. Raises `NotANumber`."""
    rows = eval_set.rows
    losses = likelihood.likelihood(subject.model, rows["input_ids"][:], rows["labels"][:], batch)
    for row in np.flatnonzero(~np.isfinite(losses.nll)):
        raise NotANumber(f"the loss on test conversation {eval_set.names[row]} is {losses.nll[row]}")
    return losses


def answer_all(
    subject: Subject, eval_set: EvalSet, evaluation: Eval, path: Path, seconds: dict[str, float]
) -> list[Answer]:
    """Returns an answer to every question. Each batch is written to `path` as soon as it is there."""
    began, asked = time.monotonic(), eval_set.asked
    answered = stored_answers(path)
    if len(answered) < len(asked):
        limits = answers.Limits(evaluation.final_max_new_tokens, evaluation.batch_size)
        done = frozenset(answered)
        with path.open("a", encoding="utf-8") as lines:
            for batch in answers.answer_in_batches(subject.model, subject.tokenizer, asked, limits, done):
                answered |= batch
                rows = [{"place": index, **asdict(each)} for index, each in batch.items()]
                lines.write("".join(json.dumps(row) + "\n" for row in rows))
                lines.flush()
        seconds[path.stem] = round(time.monotonic() - began, 1)
    return [answered[index] for index in range(len(asked))]


def score_under_base(subject: Subject, asked: Sequence[Question], texts: Sequence[str], batch: int) -> Likelihood:
    """Returns the likelihood of each text as the answer to its question, under the base model."""
    tokenizer = subject.tokenizer
    input_ids, labels = [], []
    for question, text in zip(asked, texts, strict=True):
        prompt = encode(tokenizer, question.messages, add_generation_prompt=True).input_ids
        words = encode_contents(tokenizer, [{"role": "assistant", "content": text}])[0] if text else []
        input_ids.append([*prompt, *words])
        labels.append([IGNORE_INDEX] * len(prompt) + words)
    with subject.without_adapter():
        return likelihood.likelihood(subject.model, input_ids, labels, batch)
