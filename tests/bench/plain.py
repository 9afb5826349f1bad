"""The training script that medtune is measured against: TRL, PEFT and bitsandbytes at TRL's defaults. Knows no medtune.

Command: python tests/bench/plain.py --model FOLDER --rows rows.json --out FOLDER [--r 8 --learning-rate 1e-4 --steps 6]
(tests/bench/training.py writes the rows, {"train": [{"input_ids", "labels"}], "validation": […]}, and names the folder)

Model, adapter, schedule, batch, seed and rows are those of medtune's run beside it. What TRL decides stays as TRL has
it: gradient checkpointing on, autocast, the adapter in bfloat16, loss over every position, evaluation in batches of 8.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
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
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, quantization_config=quantization)
    lora = LoraConfig(
        r=options.r,
        lora_alpha=2 * options.r,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    arguments = SFTConfig(
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # of all steps
        max_length=256,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows["train"]),
        eval_dataset=Dataset.from_list(rows["validation"]),
        processing_class=tokenizer,
        peft_config=lora,
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


if __name__ == "__main__":
    main()
