"""What a model is measured on after training, and what it says there: kept as it comes, so that nothing is lost.

The test set is read once for each model: what was measured is stored under a name made of everything it depends on, and
the next evaluation of the same finds it there. An interrupted one goes on at the batch where it stopped.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.config.schema import Eval
from medtune.data.tokenization import chat_template as conversation
from medtune.data.tokenization.dataset import IGNORE_INDEX
from medtune.evaluation import answers as samples
from medtune.evaluation.answers import Answer, Question
from medtune.evaluation.eval_set import EvalSet
from medtune.evaluation.likelihood import Likelihood, likelihood
from medtune.evaluation.output_cache import load_or_compute, stored_answers
from medtune.runtime.files import read_json, write_json

log = logging.getLogger(__name__)


class NotANumber(Exception):
    """A model whose loss on a row is no number: it answers nothing."""


@dataclass
class ModelOutputs:
    """What a model made of an examination.

    `likelihood` runs over its rows, `answers` over what was asked, `fluency` over the answers to the test questions:
    what the untuned base thinks of their words. `seconds` of each part, when it was measured.
    """

    likelihood: Likelihood
    answers: list[Answer]
    fluency: Likelihood
    seconds: dict[str, float]


def collect_outputs(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: EvalSet,
    evaluation: Eval,
    store: Path,
    reads: Path,
) -> ModelOutputs:
    """Loss on every row, an answer to every question, and what the base thinks of those answers.

    `store` is a folder for this model and examination alone; what is in it already is not measured again. Its first use
    is noted as a read of the test set in the file `reads`. Raises `NotANumber` when the loss of a row is not
    finite.
    """
    store.mkdir(parents=True, exist_ok=True)
    if not (store / "seconds.json").is_file():
        record_test_read(reads, exam)
        write_json(store / "seconds.json", {})
    seconds = read_json(store / "seconds.json")
    batch = evaluation.batch_size
    if not (store / "fluency.npz").is_file():
        who = "the adapter" if isinstance(model, PeftModel) else "the untuned base"
        log.info("measuring %s: %s test conversations, %s answers", who, len(exam.names), len(exam.asked))

    def losses_of_rows() -> Likelihood:
        found = likelihood(model, exam.rows["input_ids"][:], exam.rows["labels"][:], batch)
        for row in np.flatnonzero(~np.isfinite(found.nll)):
            raise NotANumber(f"the loss on test conversation {exam.names[row]} is {found.nll[row]}")
        return found

    losses = load_or_compute(store / "loss.npz", losses_of_rows, seconds)
    answers = answered(model, tokenizer, exam, evaluation, store / "answers.jsonl", seconds)
    texts = [answer.text for answer in answers[: len(exam.answered)]]
    fluency = load_or_compute(
        store / "fluency.npz", lambda: score_under_base(model, tokenizer, exam.tested, texts, batch), seconds
    )
    write_json(store / "seconds.json", seconds)
    return ModelOutputs(losses, answers, fluency, seconds)


def record_test_read(path: Path, exam: EvalSet) -> None:
    """Note that a model begins to be measured on a test set."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(
            json.dumps({"began": datetime.now(UTC).isoformat(timespec="seconds"), "test_set": exam.test_set}) + "\n"
        )


def count_test_reads(path: Path, exam: EvalSet) -> int:
    """How often a test set was read by the model that this file belongs to."""
    return sum(json.loads(line)["test_set"] == exam.test_set for line in path.read_text(encoding="utf-8").splitlines())


def answered(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: EvalSet,
    evaluation: Eval,
    path: Path,
    seconds: dict[str, float],
) -> list[Answer]:
    """An answer to every question; each batch is written as soon as it is there."""
    began = time.monotonic()
    kept = stored_answers(path)
    if len(kept) < len(exam.asked):
        size, batch, done = evaluation.final_max_new_tokens, evaluation.batch_size, frozenset(kept)
        with path.open("a", encoding="utf-8") as lines:
            for part in samples.answer_in_batches(model, tokenizer, exam.asked, size, batch, done):
                kept |= part
                lines.write("".join(json.dumps({"place": place, **asdict(a)}) + "\n" for place, a in part.items()))
                lines.flush()
        seconds[path.stem] = round(time.monotonic() - began, 1)
    return [kept[place] for place in range(len(exam.asked))]


def score_under_base(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    texts: Sequence[str],
    batch: int,
) -> Likelihood:
    """Likelihood of each text as the answer to its question, under the untuned base."""
    input_ids, labels = [], []
    for question, text in zip(asked, texts, strict=True):
        prompt = conversation.encode(tokenizer, question.messages, add_generation_prompt=True).input_ids
        words = conversation.encode_contents(tokenizer, [{"role": "assistant", "content": text}])[0] if text else []
        input_ids.append([*prompt, *words])
        labels.append([IGNORE_INDEX] * len(prompt) + words)
    if not isinstance(model, PeftModel):
        return likelihood(model, input_ids, labels, batch)
    with model.disable_adapter():
        return likelihood(model, input_ids, labels, batch)
