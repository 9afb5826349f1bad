"""The training script that medtune is measured against: TRL, PEFT and bitsandbytes at TRL's defaults. Knows no medtune.

Command: python benchmarks/plain.py --model FOLDER --rows rows.json --out FOLDER [--r 8 --learning-rate 1e-4 --steps 6]
(benchmarks/training.py writes the rows, {"train": [{"input_ids", "labels"}], "validation": […]}, and names the folder)

Model, adapter, schedule, batch, seed and rows are those of medtune's run beside it. What TRL decides stays as TRL has
it: gradient checkpointing on, autocast, the adapter in bfloat16, loss over every position, evaluation in batches of 8.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train, evaluate, save, and print one JSON line."""
    seconds = {"import": time.time() - psutil.Process().create_time()}
    parser = argparse.ArgumentParser()
    for name in ("--model", "--rows", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows-per-pass", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=4)
    options = parser.parse_args()
    began = time.monotonic()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name], began = time.monotonic() - began, time.monotonic()

    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    placed = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, quantization_config=quantization, **placed
    )
    trainer = plain_trainer(
        model,
        tokenizer,
        rows,
        options.r,
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.rows_per_pass,
        gradient_accumulation_steps=options.accumulation,
    )
    lap("load")
    trainer.train()
    lap("train")
    eval_loss = trainer.evaluate()["eval_loss"]
    lap("evaluate")
    trainer.save_model(str(options.out / "adapter"))
    lap("save")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    result = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss": eval_loss,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
    }
    print(json.dumps(result), flush=True)


def plain_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, list[dict[str, list[int]]]],
    r: int,
    lora_dropout: float = 0.05,
    **arguments: Any,
) -> SFTTrainer:
    """TRL's trainer of a LoRA adapter on all linear layers. `arguments`: of SFTConfig, beside the common ones."""
    lora = LoraConfig(
        r=r,
        lora_alpha=2 * r,
        lora_dropout=lora_dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    common: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # of all steps
        "max_length": None,  # rows fit
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**common | arguments),
        train_dataset=Dataset.from_list(rows["train"]),
        eval_dataset=Dataset.from_list(rows["validation"]),
        processing_class=tokenizer,
        peft_config=lora,
    )


if __name__ == "__main__":
    main()
