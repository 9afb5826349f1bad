"""Questions -> greedy answers, many at a time: at each evaluation to a fixed few, at the end to the held-out sets.

The questions, their order and the greedy decoding are the same at every step and for every member: rows compare.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.config.schema import RunConfig
from medtune.data.reading.normalize import Messages
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

    `reference`: the doctor's own answer, where there is one. `category` and `expected`: of a question of the safety
    set, and what a safe answer to it does.
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
    """What the model said: text up to the stop token, why it ended (end_of_turn, or length), tokens generated."""

    text: str
    stop: str
    tokens: int


def prompt_questions(
    prompts: Sequence[str], system_prompt: str, category: str = "", expected: str = ""
) -> list[Question]:
    """Questions of one message each, behind the system prompt."""
    system = {"role": "system", "content": system_prompt.strip()}
    return [
        Question([system, {"role": "user", "content": prompt.strip()}], "", category, expected) for prompt in prompts
    ]


def last_turn_questions(conversations: Sequence[Messages]) -> list[Question]:
    """The last question of each conversation; its answer is the reference."""
    return [Question(messages[:-1], messages[-1]["content"]) for messages in conversations]


def questions(run: RunConfig, tokens: Dataset, validation: ConversationTable) -> list[Question]:
    """What is asked at every evaluation: the configured prompts, emergencies, then held-out conversations.

    `tokens`: the validation set's token ids, which say where in `validation` they come from, and what was left out.
    """
    asked = prompt_questions(run.eval.prompts, run.data.system_prompt)
    for prompt in red_flags(run.eval.red_flags):
        asked += prompt_questions([prompt.prompt], run.data.system_prompt, prompt.category, prompt.expected)
    first = tokens.select(range(min(run.eval.held_out, len(tokens))))
    return asked + last_turn_questions(
        [drop_first_turns(validation[row["place"]].messages, row["dropped"]) for row in first]
    )


def answer(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    max_new_tokens: int,
    batch: int,
) -> list[Answer]:
    """Answer all questions greedily, `batch` at a time, in their order."""
    answered: dict[int, Answer] = {}
    for part in answer_in_batches(model, tokenizer, asked, max_new_tokens, batch):
        answered |= part
    return [answered[place] for place in range(len(asked))]


def answer_in_batches(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    max_new_tokens: int,
    batch: int,
    done: frozenset[int] = frozenset(),
) -> Iterator[dict[int, Answer]]:
    """Answer greedily and yield the answers of one batch at a time, by the place of their question.

    Prompts are rendered as in training. An answer ends at the first token of the model's stop list, or after
    `max_new_tokens`. Which questions share a batch depends on `asked` and `batch` alone, because rounding depends on
    it; batches that lie in `done` are passed over.
    """
    prompts = [encode(tokenizer, question.messages, add_generation_prompt=True).input_ids for question in asked]
    stops = unwrap_peft(model).generation_config.eos_token_id
    for places in batches_by_length([len(ids) for ids in prompts], batch, "answers"):
        if done.issuperset(places):
            continue
        rows = greedy(model, [prompts[place] for place in places], stops, max_new_tokens)
        yield {place: read_answer(tokenizer, ids, set(stops)) for place, ids in zip(places, rows, strict=True)}


def read_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: set[int]) -> Answer:
    """Cut a generated row at its first stop token; control tokens before it stay visible in the text."""
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=False)).strip()
    return Answer(text, LENGTH if end is None else END_OF_TURN, len(ids[:end]))
