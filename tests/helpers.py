"""What tests share: conversations, a tiny random Llama, and runs composed as the command line composes them."""

import json
from pathlib import Path
from typing import Any

import hydra
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
    """The run that these overrides give on the command line."""
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return build_config(hydra.compose("train", list(overrides)), RunConfig)
