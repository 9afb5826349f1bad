"""A tiny random Llama, a few conversations, and runs composed exactly as the command line composes them."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before any library reads them: tests need no network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import CHATML, SPECIAL, compose, conversations, save_random_llama, write_jsonl
from medtune.config.schema import RunConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what took a minute to make run in one process (pytest -n … --dist loadgroup)."""
    for item in items:
        for costly in {"smoke", "installed", "trained", "whole"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(costly.replace("smoke", "installed")))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach another machine fails the test."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):  # type: ignore[index]
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 512 tokens with ChatML control tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((m["content"] for row in conversations(200) for m in row["messages"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=CHATML
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a random Llama of two layers."""
    return save_random_llama(
        tmp_path_factory.mktemp("tiny-llama"),
        tokenizer,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations as JSON lines."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "conversations.jsonl", conversations())


@pytest.fixture(scope="session")
def tiny_overrides(tiny: Path, data_file: Path) -> list[str]:
    """A run of six steps on the tiny model, in float32 arithmetic so that equal means equal."""
    return [
        "data=local",
        f"data.path={data_file}",
        "data.columns.group=group",
        "model.weights=folder",
        f"model.path={tiny}",
        "model.hub_id=medtune/tiny-test",
        "model.dtype=float32",
        "model.pad_token='<pad>'",
        "trainer.max_steps=6",
        "eval.every=3",
        "trainer.per_device_train_batch_size=2",
        "trainer.max_length=256",
        "eval.prompts=[I have a fever and a sore throat. What should I do?]",
        "eval.held_out=1",
        "eval.red_flags=0",
        "eval.max_new_tokens=4",
        "eval.final_max_new_tokens=4",
        "eval.safety=false",
        "eval.final=false",
        "eval.resamples=200",
        "wandb=disabled",
    ]


@pytest.fixture
def tiny_run(tiny_overrides: list[str]) -> Callable[..., RunConfig]:
    """Compose a run on the tiny model; later overrides win."""
    return lambda *more: compose(*tiny_overrides, *more)


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Training quiets libraries for good; tests that follow should hear them again."""
    import logging

    level = logging.getLogger("bitsandbytes").level
    yield
    logging.captureWarnings(False)
    logging.getLogger("bitsandbytes").setLevel(level)
