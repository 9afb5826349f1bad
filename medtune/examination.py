"""What a model is measured on after training, and what it says there: kept as it comes, so that nothing is lost.

The test set is read once for each model: what was measured is stored under a name made of everything it depends on, and
the next evaluation of the same finds it there. An interrupted one goes on at the batch where it stopped.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune import conversation, decoding, frozen, fused, kernels, likelihood, low_rank, samples
from medtune import model as base_model
from medtune.config import Eval
from medtune.data import Conversations
from medtune.data.questions import question_key
from medtune.likelihood import Likelihood
from medtune.result import read_json, versions, write_json
from medtune.safety.prompts import prompts
from medtune.samples import Answer, Question
from medtune.saved_adapter import config_of, weights_of
from medtune.tokens import IGNORED, Tokens

log = logging.getLogger(__name__)

DECIDE = ("torch", "transformers", "peft", "bitsandbytes")  # packages that decide what a model says

# A change of these, or of the kernels, may change what is measured.
CODE: tuple[ModuleType, ...] = (conversation, likelihood, samples, decoding, base_model, frozen, fused, low_rank)


class NotANumber(Exception):
    """A model whose loss on a row is no number: it answers nothing."""


@dataclass
class Examination:
    """A test set and the safety set.

    `rows`: token ids and labels of the test conversations, for the loss. `names`: of each row its source and number;
    `groups`: drawn whole in a bootstrap. `answered`: the rows whose last question is asked.
    `asked`: those questions, then the safety set. `others`: for each of `answered` the answer of another doctor to the
    same question, or an empty text.
    """

    rows: Dataset
    names: list[str]
    groups: list[str]
    answered: list[int]
    asked: list[Question]
    others: list[str]

    @property
    def tested(self) -> list[Question]:
        """The questions of the test set."""
        return self.asked[: len(self.answered)]

    @property
    def answered_groups(self) -> list[str]:
        """Group of each question of the test set."""
        return [self.groups[row] for row in self.answered]

    @cached_property
    def test_set(self) -> str:
        """SHA-256 of the test conversations alone, whatever else is asked."""
        return hashlib.sha256(json.dumps(self.rows["input_ids"][:]).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that is shown to a model."""
        shown = [self.rows["input_ids"][:], self.rows["labels"][:], [question.messages for question in self.asked]]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def examination(tokens: Tokens, conversations: Conversations, evaluation: Eval, system_prompt: str) -> Examination:
    """Put together what a model is asked.

    At most `eval.answers` of the test conversations are answered, evenly spread over the set.
    """
    kept = [conversations.test[place] for place in tokens.test["place"]]
    dropped = tokens.test["dropped"][:]
    messages = [conversation.shortened(found.messages, count) for found, count in zip(kept, dropped, strict=True)]
    count = len(kept) if evaluation.answers is None else min(evaluation.answers, len(kept))
    answered = np.linspace(0, len(kept) - 1, count).round().astype(int).tolist() if count else []
    asked = samples.held_out([messages[row] for row in answered])
    if evaluation.safety:
        for prompt in prompts():
            asked += samples.asked_of([prompt.prompt], system_prompt, prompt.category, prompt.expected)
    others = other_answers(conversations.rejects)
    return Examination(
        rows=tokens.test,
        names=[f"{found.source}:{found.row}" for found in kept],
        groups=[found.group for found in kept],
        answered=answered,
        asked=asked,
        others=[others.get(question_key(kept[row].messages), "") for row in answered],
    )


def other_answers(rejects: Path) -> dict[int, str]:
    """Answers left out because their question has one already: by the question, what another doctor said to it."""
    found: dict[int, str] = {}
    with rejects.open(encoding="ascii") as lines:
        for line in lines:
            reject = json.loads(line)
            if reject["rule"] == "answers_per_question":
                key = question_key(reject["content"])
                found.setdefault(key, reject["content"][-1]["content"])
    return found


@dataclass
class Measured:
    """What a model made of an examination.

    `likelihood` runs over its rows, `answers` over what was asked, `fluency` over the answers to the test questions:
    what the untuned base thinks of their words. `seconds` of each part, when it was measured.
    """

    likelihood: Likelihood
    answers: list[Answer]
    fluency: Likelihood
    seconds: dict[str, float]


def measure(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: Examination,
    evaluation: Eval,
    store: Path,
    reads: Path,
) -> Measured:
    """Loss on every row, an answer to every question, and what the base thinks of those answers.

    `store` is a folder for this model and examination alone; what is in it already is not measured again. Its first use
    is noted as a read of the test set in the file `reads`. Raises `NotANumber` when the loss of a row is not
    finite.
    """
    store.mkdir(parents=True, exist_ok=True)
    if not (store / "seconds.json").is_file():
        note_read(reads, exam)
        write_json(store / "seconds.json", {})
    seconds = read_json(store / "seconds.json")
    batch = evaluation.batch_size
    if not (store / "fluency.npz").is_file():
        who = "the adapter" if isinstance(model, PeftModel) else "the untuned base"
        log.info("measuring %s: %s test conversations, %s answers", who, len(exam.names), len(exam.asked))

    def losses_of_rows() -> Likelihood:
        found = likelihood.likelihood(model, exam.rows["input_ids"][:], exam.rows["labels"][:], batch)
        for row in np.flatnonzero(~np.isfinite(found.nll)):
            raise NotANumber(f"the loss on test conversation {exam.names[row]} is {found.nll[row]}")
        return found

    losses = stored(store / "loss.npz", losses_of_rows, seconds)
    answers = answered(model, tokenizer, exam, evaluation, store / "answers.jsonl", seconds)
    texts = [answer.text for answer in answers[: len(exam.answered)]]
    fluency = stored(store / "fluency.npz", lambda: under_base(model, tokenizer, exam.tested, texts, batch), seconds)
    write_json(store / "seconds.json", seconds)
    return Measured(losses, answers, fluency, seconds)


def note_read(path: Path, exam: Examination) -> None:
    """Note that a model begins to be measured on a test set."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(
            json.dumps({"began": datetime.now(UTC).isoformat(timespec="seconds"), "test_set": exam.test_set}) + "\n"
        )


def reads_of(path: Path, exam: Examination) -> int:
    """How often a test set was read by the model that this file belongs to."""
    return sum(json.loads(line)["test_set"] == exam.test_set for line in path.read_text(encoding="utf-8").splitlines())


def stored(path: Path, make: Callable[[], Likelihood], seconds: dict[str, float]) -> Likelihood:
    """What a file holds, or what `make` gives, which is then written, and its seconds noted."""
    if not path.is_file():
        began = time.monotonic()
        save_likelihood(path, make())
        seconds[path.stem] = round(time.monotonic() - began, 1)
    return load_likelihood(path)


def save_likelihood(path: Path, found: Likelihood) -> None:
    """Write a likelihood as a NumPy archive."""
    unfinished = path.with_suffix(".tmp.npz")  # a reader never meets half of it
    np.savez(unfinished, nll=found.nll, tokens=found.tokens, correct=found.correct)
    unfinished.replace(path)


def load_likelihood(path: Path) -> Likelihood:
    """Read what `save_likelihood` wrote."""
    with np.load(path) as arrays:
        return Likelihood(arrays["nll"], arrays["tokens"], arrays["correct"])


def answered(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: Examination,
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


def under_base(
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
        words = conversation.contents_of(tokenizer, [{"role": "assistant", "content": text}])[0] if text else []
        input_ids.append([*prompt, *words])
        labels.append([IGNORED] * len(prompt) + words)
    if not isinstance(model, PeftModel):
        return likelihood.likelihood(model, input_ids, labels, batch)
    with model.disable_adapter():
        return likelihood.likelihood(model, input_ids, labels, batch)


def stored_answers(path: Path) -> dict[int, Answer]:
    """Answers by the place of their question, cut to whole lines: an interrupted last one is asked again."""
    if not path.is_file():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    return {row["place"]: Answer(row["text"], row["stop"], row["tokens"]) for row in rows}


def name_of(
    exam: Examination, evaluation: Eval, base: PreTrainedModel, base_fingerprint: str, adapter: Path | None
) -> str:
    """A name for what `measure` finds: of the model to the bit, of what it is asked, and of the arithmetic."""
    files = [] if adapter is None else [weights_of(adapter), config_of(adapter)]
    weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    files_of_code = [*(Path(str(module.__file__)) for module in CODE), *sorted(kernels.FOLDER.glob("*.py"))]
    code = [path.read_text(encoding="utf-8") for path in files_of_code]
    device = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else "cpu"
    settings = [evaluation.final_max_new_tokens, evaluation.batch_size, device, str(base.dtype), versions(DECIDE)]
    stops = base.generation_config.eos_token_id
    parts = [base_fingerprint, weights, exam.fingerprint, settings, stops, code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
