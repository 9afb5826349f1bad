"""What tests share: conversations, a tiny random Llama, and runs composed as the command line composes them."""

import copy
import importlib
import json
import logging
import sys
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from medtune.config.groups import CONF, register
from medtune.config.schema import RunConfig
from medtune.config.validation import build_config

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def conversations(count: int = 40) -> list[dict]:
    """Short conversations in as many groups; every third has two exchanges."""
    complaints = ["a cough", "a rash", "back pain", "a headache", "an ear ache", "itchy eyes", "a sore knee", "hiccups"]
    rows = []
    for i in range(count):
        complaint = complaints[i % len(complaints)]
        messages = [
            {"role": "user", "content": f"I have had {complaint} for {i + 2} days. Is it serious?"},
            {"role": "assistant", "content": f"Usually {complaint} settles. See a doctor after {i + 9} days."},
        ]
        if i % 3 == 0:
            messages += [
                {"role": "user", "content": "And if it gets worse?"},
                {"role": "assistant", "content": f"Then come sooner, within {i % 5 + 1} days."},
            ]
        rows.append({"messages": messages, "topic": complaint, "group": f"case-{i}"})
    return rows


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def save_random_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> Path:
    """Save a Llama of two layers with random weights, and its tokenizer, in a folder."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compose(*overrides: str) -> RunConfig:
    """The run that these overrides give on the command line; composed once for the same words."""
    return copy.deepcopy(composed(overrides))


@cache
def composed(overrides: tuple[str, ...]) -> RunConfig:
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return build_config(hydra.compose("train", list(overrides)), RunConfig)


def in_process(
    module: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CompletedProcess[str]:
    """What `python -m MODULE WORDS` answers, without a process: for what is refused or shown before anything runs."""
    handlers, level = logging.root.handlers[:], logging.root.level
    monkeypatch.setattr(sys, "argv", [module, *words])
    capsys.readouterr()
    status = 0
    try:
        with monkeypatch.context() as patch:
            patch.setenv("HYDRA_FULL_ERROR", "")  # the command sets it: what stood there before comes back
            patch.delenv("HYDRA_FULL_ERROR")
            patch.setattr(logging, "shutdown", lambda: None)
            patch.setattr("medtune.runtime.interruption.install_handlers", lambda: None)
            importlib.import_module(module).main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        GlobalHydra.instance().clear()
        logging.root.handlers[:], logging.root.level = handlers, level
    out, err = capsys.readouterr()
    return CompletedProcess([module, *words], status, out, err)
