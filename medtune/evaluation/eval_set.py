"""The test conversations and the safety prompts that a model is evaluated on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset

from medtune.config.schema import Eval
from medtune.data.prepared import PreparedData
from medtune.data.splitting.question_hashes import question_key
from medtune.data.tokenization.chat_template import drop_first_turns
from medtune.data.tokenization.dataset import TokenizedSplits
from medtune.evaluation.answers import Question, last_turn_questions, prompt_questions
from medtune.evaluation.safety.prompts import prompts


@dataclass
class EvalSet:
    """A test set and the safety set.

    `rows`: token ids and labels of the test conversations, for the loss. `names`: source and number of each row.
    `groups`: the group of each row; a bootstrap draws groups whole. `answered`: indices of the rows whose last question
    is asked. `asked`: those questions, then the safety set. `others`: for each of `answered` another doctor's answer to
    the same question, or an empty text.
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
        """The group of each question of the test set."""
        return [self.groups[row] for row in self.answered]

    @cached_property
    def test_set(self) -> str:
        """SHA-256 of the test conversations alone, whatever else is asked."""
        return hashlib.sha256(json.dumps(self.rows["input_ids"][:]).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that is shown to a model."""
        return fingerprint_of(self.rows, self.asked)


def fingerprint_of(rows: Dataset, asked: Sequence[Question]) -> str:
    """Returns the SHA-256 of token ids, labels and questions that are shown to a model."""
    shown = [rows["input_ids"][:], rows["labels"][:], [question.messages for question in asked]]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def build_eval_set(tokens: TokenizedSplits, data: PreparedData, evaluation: Eval, system_prompt: str) -> EvalSet:
    """Builds the evaluation set of a run.

    At most `eval.answers` of the test conversations are answered, evenly spread over the set.
    """
    conversations = [data.test[index] for index in tokens.test["place"]]
    dropped = tokens.test["dropped"][:]
    messages = [drop_first_turns(c.messages, count) for c, count in zip(conversations, dropped, strict=True)]
    count = len(conversations) if evaluation.answers is None else min(evaluation.answers, len(conversations))
    answered = np.linspace(0, len(conversations) - 1, count).round().astype(int).tolist() if count else []
    asked = last_turn_questions([messages[row] for row in answered])
    if evaluation.safety:
        for prompt in prompts():
            asked += prompt_questions([prompt.prompt], system_prompt, prompt.category, prompt.expected)
    others = second_answers(data.rejects)
    return EvalSet(
        rows=tokens.test,
        names=[f"{conversation.source}:{conversation.row}" for conversation in conversations],
        groups=[conversation.group for conversation in conversations],
        answered=answered,
        asked=asked,
        others=[others.get(question_key(conversations[row].messages), "") for row in answered],
    )


def second_answers(rejects: Path) -> dict[int, str]:
    """Returns by question what another doctor answered, from rows rejected because their question had an answer."""
    answers: dict[int, str] = {}
    with rejects.open(encoding="ascii") as lines:
        for line in lines:
            reject = json.loads(line)
            if reject["rule"] == "answers_per_question":
                key = question_key(reject["content"])
                answers.setdefault(key, reject["content"][-1]["content"])
    return answers
