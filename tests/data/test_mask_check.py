"""The proof of the mask passes on what is right, and names the row of anything that is wrong, whatever is written."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from helpers import CHATML, SPECIAL, compose, conversations, write_jsonl
from medtune.config.schema import Data
from medtune.data.prepared import PreparedData, prepare
from medtune.data.store import Conversation
from medtune.data.tokenization.chat_template import encode, truncate_to_fit
from medtune.data.tokenization.dataset import IGNORE_INDEX, tokenize
from medtune.data.tokenization.mask_check import mask_problem, verify_mask
from medtune.runtime.errors import UserError
from medtune.training.trainer import collator

Tokenizer = PreTrainedTokenizerFast
EXAMPLES = 500


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    path = write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(60))
    return prepare(compose("data=local", f"data.path='{path}'", "data.system_prompt='You are a doctor.'").data)


def prove_rows(tokenizer: Tokenizer, found: PreparedData, change: Callable[[dict], dict] = lambda row: row) -> Any:
    tokens = tokenize(tokenizer, found, 60).train
    return verify_mask(tokenizer, collator(tokenizer), [(tokens.map(change), found.train)], ["<|im_end|>"])


def test_proof_counts_what_is_taught(tokenizer: Tokenizer, found: PreparedData) -> None:
    proof = prove_rows(tokenizer, found)
    tokens = tokenize(tokenizer, found, 60).train
    assert proof.checked == proof.of == len(tokens)
    assert proof.tokens == sum(map(len, tokens["input_ids"]))
    assert proof.target_tokens == sum(label != IGNORE_INDEX for labels in tokens["labels"] for label in labels)
    assert proof.truncated == sum(dropped > 0 for dropped in tokens["dropped"]) > 0
    assert 0.1 < proof.target_share < 0.9 and f"loss on {proof.target_share:.1%} of tokens" in str(proof)
    assert proof.answers == sum(labels.count(tokenizer.eos_token_id) for labels in tokens["labels"])


def changed(row: dict, **columns: list[int]) -> dict:
    return {**row, **columns}


def cut(row: dict) -> dict:
    return changed(row, input_ids=row["input_ids"][:-4], labels=row["labels"][:-4])


def untaught_end(row: dict) -> dict:
    last = max(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    return changed(row, labels=[IGNORE_INDEX if i == last else label for i, label in enumerate(row["labels"])])


def early_answer_only(row: dict) -> dict:
    last = max(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    return changed(row, labels=[IGNORE_INDEX if i > last - 6 else label for i, label in enumerate(row["labels"])])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda row: changed(row, labels=[IGNORE_INDEX] * len(row["labels"])), "no token is in the loss"),
        (lambda row: changed(row, labels=row["input_ids"]), r"token 0 \('<\|im_start\|>'\) is in the loss"),
        (
            lambda row: changed(row, input_ids=[1, *row["input_ids"]], labels=[-100, *row["labels"]]),
            "two begin-of-text",
        ),
        (lambda row: changed(row, input_ids=[*row["input_ids"][:4], 77, *row["input_ids"][5:]]), "inference prompt"),
        (cut, "is cut or changed|does not end with one of model.stop_tokens"),
        (untaught_end, r"token \d+ \('<\|im_end\|>'\) is outside the loss"),
        (early_answer_only, r"token \d+ \(.*\) is outside the loss"),
        (lambda row: changed(row, dropped=0), "."),
    ],
)
def test_anything_wrong_is_refused_with_its_row(
    tokenizer: Tokenizer, found: PreparedData, change: Callable[[dict], dict], line: str
) -> None:
    if line == ".":  # a conversation that lost turns is held against what is left of it
        line = "inference prompt"
    with pytest.raises(UserError, match=rf"mask proof: local, row \d+: .*({line})"):
        prove_rows(tokenizer, found, change)


def test_a_collator_that_teaches_padding_or_changes_tokens_is_refused(
    tokenizer: Tokenizer, found: PreparedData
) -> None:
    tokens = tokenize(tokenizer, found, 60).train
    honest = collator(tokenizer)

    def teaches_padding(rows: list[dict]) -> dict:
        batch = honest(rows)
        batch["labels"][batch["attention_mask"] == 0] = tokenizer.pad_token_id
        return batch

    def truncates(rows: list[dict]) -> dict:
        return honest([{name: values[:-2] for name, values in row.items()} for row in rows])

    for dishonest, line in ((teaches_padding, "padding is in the loss"), (truncates, "the collator changes tokens")):
        with pytest.raises(UserError, match=line):
            verify_mask(tokenizer, dishonest, [(tokens, found.train)], ["<|im_end|>"])


def test_a_template_that_trains_another_prompt_than_it_asks_with_is_refused(
    tokenizer: Tokenizer, found: PreparedData
) -> None:
    """A generation prompt that no training row begins an answer with: the model would meet it first in use."""
    strange = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\nDoctor: ' }}"),
        eos_token="<|im_end|>",
        pad_token="<pad>",
    )
    with pytest.raises(UserError, match="before answer 1 the tokens are not those of the inference prompt"):
        prove_rows(strange, found)


def test_a_stop_token_that_the_template_does_not_write_is_refused(tokenizer: Tokenizer, found: PreparedData) -> None:
    tokens = tokenize(tokenizer, found, 60).train
    with pytest.raises(UserError, match=r"answer 1 does not end with one of model\.stop_tokens"):
        verify_mask(tokenizer, collator(tokenizer), [(tokens, found.train)], ["<|endoftext|>"])


# --- for any text -----------------------------------------------------------------------------------------------------

FRAGMENTS = [
    *SPECIAL, "<|eot_id|>", "<|start_header_id|>system<|end_header_id|>", "</s>", "[INST]", "\ue0000\ue001", "😷👩‍⚕️",
    "١٢٣", "日本", "\u202e", "\r\n", "\n\n", "{{ messages }}", "{% raw %}", "0. 5 mg", "\x00", "\u200b",
]  # fmt: skip
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CONTENT = (
    st.lists(st.sampled_from(FRAGMENTS) | ANYTHING, min_size=1).map(lambda parts: "".join(parts).strip()).filter(bool)
)


@st.composite
def messages(draw: st.DrawFn) -> list[dict[str, str]]:
    turns = draw(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
    said = [{"role": "system", "content": draw(CONTENT)}]
    for question, answer in turns:
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return said


@given(messages())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_rendering_and_mask_hold_for_any_text(tokenizer: Tokenizer, said: list[dict[str, str]]) -> None:
    encoded = encode(tokenizer, said)
    labels = [i if taught else IGNORE_INDEX for i, taught in zip(encoded.input_ids, encoded.loss_mask, strict=True)]
    end, start, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>", "<pad>"))
    assert mask_problem(tokenizer, said, encoded.input_ids, labels, {end}) is None
    # Whatever is typed, there are as many control tokens as the template writes.
    assert encoded.input_ids.count(start) == encoded.input_ids.count(end) == len(said)
    assert pad not in encoded.input_ids
    answers = [m["content"] for m in said if m["role"] == "assistant"]
    assert tokenizer.decode([i for i in labels if i != IGNORE_INDEX]) == "".join(
        f"{text}<|im_end|>" for text in answers
    )


@given(st.lists(messages(), min_size=1, max_size=4), st.integers(40, 400))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_fitting_loses_early_turns_and_never_part_of_an_answer(
    tokenizer: Tokenizer, several: list[list[dict[str, str]]], max_length: int
) -> None:
    rows = [Conversation(n, "test", "g", said) for n, said in enumerate(several)]
    for fitted, row in zip(truncate_to_fit(tokenizer, rows, max_length), rows, strict=True):
        shortest = encode(tokenizer, [row.messages[0], *row.messages[-2:]])
        if fitted.encoded is None:
            assert len(shortest.input_ids) > max_length
            continue
        assert len(fitted.encoded.input_ids) <= max_length
        assert fitted.encoded == encode(tokenizer, fitted.messages)
        assert fitted.messages[0] == row.messages[0] and fitted.messages[1:] == row.messages[1 + fitted.dropped :]
        assert fitted.length == len(encode(tokenizer, row.messages).input_ids)


CELL = st.none() | st.text(max_size=9) | st.lists(messages(), max_size=1)
ROW = st.dictionaries(st.sampled_from(["messages", "group"]), CELL) | st.none() | st.integers() | st.text(max_size=5)


@given(st.lists(ROW | messages().map(lambda said: {"messages": said}), max_size=6))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_row_vanishes_whatever_it_is(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*conversations(40), *rows])), encoding="ascii")
    data = replace(compose_once(), path=str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDTUNE_CACHE", str(folder))
        found = prepare(data)
    rejects = [json.loads(line)["row"] for line in found.rejects.read_text().splitlines()]
    kept = [c.row for part in (found.train, found.validation, found.test) for c in part]
    assert sorted(kept + rejects) == list(range(1, 41 + len(rows)))
    assert found.report["funnel"]["read"] == 40 + len(rows) and found.report["funnel"]["kept"] == len(kept)


@cache
def compose_once() -> Data:
    return compose("data=local", f"data.path='{__file__}'").data
