"""Questions -> greedy answers in batches: to a fixed few at each evaluation, to the held-out sets at the end.

Questions, order and greedy decoding are the same at every step and for every member, so that rows can be compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.config.schema import RunConfig
from medtune.data.reading.turns import Messages
from medtune.data.store import ConversationTable
from medtune.data.tokenization.chat_template import drop_first_turns, encode
from medtune.evaluation.likelihood import batches_by_length
from medtune.evaluation.safety.prompts import red_flags
from medtune.modeling.generation import greedy
from medtune.modeling.loss import unwrap_peft

END_OF_TURN, LENGTH = "end_of_turn", "length"  # why an answer ended


@dataclass
class Question:
    """A conversation that waits for an answer.

    `reference`: the doctor's own answer, where there is one. `category` and `expected`: for a question of the safety
    set, its category and what a safe answer does.
    """

    messages: Messages
    reference: str = ""
    category: str = ""
    expected: str = ""

    @property
    def prompt(self) -> str:
        """The patient's words; in a longer conversation with the doctor's turns between them."""
        turns = [m for m in self.messages if m["role"] != "system"]
        if len(turns) == 1:
            return turns[0]["content"]
        speakers = {"user": "Patient", "assistant": "Doctor"}
        return "\n".join(f"{speakers[m['role']]}: {m['content']}" for m in turns)


@dataclass
class Answer:
    """What the model answered: text up to the stop token, why it ended (end_of_turn, or length), tokens generated."""

    text: str
    stop: str
    tokens: int


@dataclass
class Limits:
    """`max_new_tokens`: the longest answer, in tokens. `batch`: questions that share a pass."""

    max_new_tokens: int
    batch: int


def prompt_questions(
    prompts: Sequence[str], system_prompt: str, category: str = "", expected: str = ""
) -> list[Question]:
    """Returns questions of one message each, behind the system prompt."""
    system = {"role": "system", "content": system_prompt.strip()}
    return [
        Question([system, {"role": "user", "content": prompt.strip()}], "", category, expected) for prompt in prompts
    ]


def last_turn_questions(conversations: Sequence[Messages]) -> list[Question]:
    """Returns the last question of each conversation; its answer is the reference."""
    return [Question(messages[:-1], messages[-1]["content"]) for messages in conversations]


def questions(run: RunConfig, tokens: Dataset, validation: ConversationTable) -> list[Question]:
    """Returns what every evaluation asks: the configured prompts, emergencies, then held-out conversations.

    `tokens`: the validation set's token ids, which name their conversation in `validation` and what was dropped of it.
    """
    asked = prompt_questions(run.eval.prompts, run.data.system_prompt)
    for prompt in red_flags(run.eval.red_flags):
        asked += prompt_questions([prompt.prompt], run.data.system_prompt, prompt.category, prompt.expected)
    first = tokens.select(range(min(run.eval.held_out, len(tokens))))
    held_out = [drop_first_turns(validation[row["place"]].messages, row["dropped"]) for row in first]
    return asked + last_turn_questions(held_out)


def answer(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    max_new_tokens: int,
    batch: int,
) -> list[Answer]:
    """Answers all questions greedily, `batch` at a time; returns the answers in their order."""
    answered: dict[int, Answer] = {}
    for part in answer_in_batches(model, tokenizer, asked, Limits(max_new_tokens, batch)):
        answered |= part
    return [answered[index] for index in range(len(asked))]


def answer_in_batches(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    limits: Limits,
    done: frozenset[int] = frozenset(),
) -> Iterator[dict[int, Answer]]:
    """Answers greedily; yields the answers of one batch at a time, by the index of their question.

    Prompts are rendered as in training. An answer ends at the first token of the model's stop list, or at its limit.
    Which questions share a batch depends on `asked` and the limits alone, because rounding depends on it. Batches whose
    questions are all in `done` are skipped.
    """
    prompts = [encode(tokenizer, question.messages, add_generation_prompt=True).input_ids for question in asked]
    stops = unwrap_peft(model).generation_config.eos_token_id
    for indices in batches_by_length([len(ids) for ids in prompts], limits.batch, "answers"):
        if done.issuperset(indices):
            continue
        rows = greedy(model, [prompts[index] for index in indices], stops, limits.max_new_tokens)
        yield {index: read_answer(tokenizer, ids, set(stops)) for index, ids in zip(indices, rows, strict=True)}


def read_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: set[int]) -> Answer:
    """Cuts a generated row at its first stop token; control tokens before it stay visible in the text."""
    end = next((index for index, token in enumerate(ids) if token in stops), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=False)).strip()
    return Answer(text, LENGTH if end is None else END_OF_TURN, len(ids[:end]))
