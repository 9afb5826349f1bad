"""The test conversations and the safety prompts that a model is evaluated on."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset

from medtune.config.schema import Eval
from medtune.data.prepared import PreparedData
from medtune.data.splitting.question_hashes import question_key
from medtune.data.tokenization import chat_template as conversation
from medtune.data.tokenization.dataset import TokenizedSplits
from medtune.evaluation import answers as samples
from medtune.evaluation.answers import Question
from medtune.evaluation.safety.prompts import prompts


@dataclass
class EvalSet:
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


def build_eval_set(
    tokens: TokenizedSplits, conversations: PreparedData, evaluation: Eval, system_prompt: str
) -> EvalSet:
    """Put together what a model is asked.

    At most `eval.answers` of the test conversations are answered, evenly spread over the set.
    """
    kept = [conversations.test[place] for place in tokens.test["place"]]
    dropped = tokens.test["dropped"][:]
    messages = [
        conversation.drop_first_turns(found.messages, count) for found, count in zip(kept, dropped, strict=True)
    ]
    count = len(kept) if evaluation.answers is None else min(evaluation.answers, len(kept))
    answered = np.linspace(0, len(kept) - 1, count).round().astype(int).tolist() if count else []
    asked = samples.last_turn_questions([messages[row] for row in answered])
    if evaluation.safety:
        for prompt in prompts():
            asked += samples.prompt_questions([prompt.prompt], system_prompt, prompt.category, prompt.expected)
    others = second_answers(conversations.rejects)
    return EvalSet(
        rows=tokens.test,
        names=[f"{found.source}:{found.row}" for found in kept],
        groups=[found.group for found in kept],
        answered=answered,
        asked=asked,
        others=[others.get(question_key(kept[row].messages), "") for row in answered],
    )


def second_answers(rejects: Path) -> dict[int, str]:
    """Answers left out because their question has one already: by the question, what another doctor said to it."""
    found: dict[int, str] = {}
    with rejects.open(encoding="ascii") as lines:
        for line in lines:
            reject = json.loads(line)
            if reject["rule"] == "answers_per_question":
                key = question_key(reject["content"])
                found.setdefault(key, reject["content"][-1]["content"])
    return found
