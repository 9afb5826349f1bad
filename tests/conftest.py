"""A tiny random Llama, a few conversations, and runs composed exactly as the command line composes them."""

import inspect
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any library reads them: tests need no network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import CHATML, SPECIAL, compose, conversations, save_random_llama, write_jsonl
from medtune.config.schema import RunConfig

SHARED = {"smoke": "installed", "installed": "installed", "trained": "trained", "whole": "whole"}  # costly fixtures
STARTS_A_PROCESS = {"subprocess", "multiprocessing", "processes"}  # modules
TRAINS = {"train", "run_sweep", "build_trainer"}  # functions of medtune


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test with its tier, and tests that share what took a minute to make for one process.

    `process`: it, one of its fixtures, or a helper of theirs uses a module that starts processes. `train`: likewise a
    function that trains. (pytest -n … --dist loadgroup runs one group in one process.)
    """
    for item in items:
        names = getattr(item, "fixturenames", ())
        for group in {SHARED[name] for name in names if name in SHARED}:
            item.add_marker(pytest.mark.xdist_group(group))
        definitions = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
        own = [definitions[name][-1].func for name in names if name in definitions and name != "tiers_are_honest"]
        used = set[str]()
        for function in [item.function, *own]:  # type: ignore[attr-defined]
            collect_uses(function, used, set())
        if used & STARTS_A_PROCESS:
            item.add_marker(pytest.mark.process)
        if used & TRAINS:
            item.add_marker(pytest.mark.train)


def collect_uses(function: Any, used: set[str], seen: set[int]) -> None:
    """Adds to `used` what a function of the tests uses of `STARTS_A_PROCESS` and `TRAINS`, helpers included."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or id(code) in seen:
        return
    seen.add(id(code))
    pending = [code]
    while pending:
        current = pending.pop()
        pending += [constant for constant in current.co_consts if inspect.iscode(constant)]
        for name in (*current.co_names, *current.co_freevars):
            value = function.__globals__.get(name)
            module = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or ""
            if (package := module.partition(".")[0]) in STARTS_A_PROCESS:
                used.add(package)
            elif module.startswith("medtune.") and name in TRAINS:
                used.add(name)
            elif inspect.isfunction(value) and value.__globals__.get("pytest") is not None:
                collect_uses(value, used, seen)


@pytest.fixture(autouse=True)
def tiers_are_honest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that trains or starts Python without being marked so fails: `make check` would take it for quick."""
    if not request.node.get_closest_marker("train"):
        from medtune.training.resumable import ResumableTrainer

        monkeypatch.setattr(ResumableTrainer, "run", lambda *_: pytest.fail("it trains: it has to be marked so"))
    if not request.node.get_closest_marker("process"):
        start = subprocess.Popen.__init__

        def refuse(self: Any, args: Any, *more: Any, **options: Any) -> None:
            first = args.split()[0] if isinstance(args, str) else str(args[0])
            assert not Path(first).name.startswith("python"), f"it starts a process: it has to be marked so: {args}"
            start(self, args, *more, **options)

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


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
