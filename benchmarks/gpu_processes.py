"""A sweep as whole processes: medtune's in one, the plain script's in one for each member, loading included."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_trainers import Bench
from training_cases import ROOT
from training_report import table
from transformers import LlamaForCausalLM

from medtune.data.prepared import prepare
from medtune.data.tokenization.dataset import tokenize
from medtune.modeling.weights import random_config

RANKS, RATES = (8, 16), ("1e-4", "2e-4", "3e-4", "4e-4")
STEPS, ACCUMULATION = 10, 4


def processes(bench: Bench) -> str:
    """Measures the seconds from the first process's start to the last one's end."""
    bench.release()
    weights, rows = bench.folder / "weights", bench.folder / "rows.json"
    save_weights(bench, weights)
    write_rows(bench, rows)
    each = seconds_of(plain_command(bench, weights, rows, RANKS[0]))
    lines = [["plain script, one member", f"{each:.1f}" if each else "failed", "1.00"]]
    for members in bench.members or (4, 8):
        value = seconds_of(medtune_command(bench, weights, members // len(RANKS)))
        times = f"{members * each / value:.2f}" if value and each else "-"
        lines.append([f"medtune.train -m, {members} members", f"{value:.1f}" if value else "failed", times])
        print(*lines, sep="\n", flush=True)
    return "\n\n".join(
        [
            "### A sweep as whole processes",
            table(["", "seconds", "times as fast as plain scripts for as many"], lines),
            f"Import, loading and quantizing 16 GB of weights from the disk's cache, {STEPS} steps of {ACCUMULATION} "
            "passes of one conversation (the bundled ones), an evaluation, saving. medtune also evaluates the base "
            "model, and loads each adapter again to compare it. Several plain scripts count as many times one.",
        ]
    )


def save_weights(bench: Bench, folder: Path) -> None:
    """Saves a folder as a user would have it: bfloat16 weights and a tokenizer."""
    torch.set_default_dtype(torch.bfloat16)
    with bench.device:
        net = LlamaForCausalLM(random_config(bench.shape, bench.tokenizer))
    torch.set_default_dtype(torch.float32)
    net.save_pretrained(folder)
    bench.tokenizer.save_pretrained(folder)
    del net
    bench.collect()


def write_rows(bench: Bench, path: Path) -> None:
    """Writes the plain script's rows: medtune's tokens and labels of the bundled conversations."""
    run = bench.run("trainer.max_length=1024")
    tokens = tokenize(bench.tokenizer, prepare(run.data), run.trainer.max_length)
    splits = {name: getattr(tokens, name).select_columns(["input_ids", "labels"]) for name in ("train", "validation")}
    path.write_text(json.dumps({name: split.to_list() for name, split in splits.items()}), encoding="utf-8")


def plain_command(bench: Bench, weights: Path, rows: Path, r: int) -> list[str]:
    """Returns the plain script's command for one member."""
    words = {"--model": weights, "--rows": rows, "--out": bench.folder / f"plain-{r}", "--r": r}
    words |= {"--learning-rate": RATES[0], "--steps": STEPS, "--rows-per-pass": 1, "--accumulation": ACCUMULATION}
    script = str(ROOT / "benchmarks" / "plain.py")
    return [sys.executable, script, *(str(word) for pair in words.items() for word in pair)]


def medtune_command(bench: Bench, weights: Path, rates: int) -> list[str]:
    """Returns medtune's command for a sweep of both ranks and some learning rates."""
    swept = [f"lora.r={','.join(map(str, RANKS))}", f"trainer.learning_rate={','.join(RATES[:rates])}"]
    where = [f"hydra.sweep.dir={bench.folder / f'medtune-{rates}'}", "-m"]
    return [
        sys.executable, "-m", "medtune.train", f"model={bench.name}",
        "model.weights=folder", f"model.path={weights}", "lora=all_linear", "trainer.max_length=1024",
        f"trainer.max_steps={STEPS}", f"eval.every={STEPS}", "trainer.per_device_train_batch_size=1",
        f"trainer.gradient_accumulation_steps={ACCUMULATION}", "eval.prompts=[]", "eval.held_out=1",
        "eval.red_flags=0", "eval.max_new_tokens=1", "eval.final=false", "wandb=disabled", *swept, *where,
    ]  # fmt: skip


def seconds_of(command: list[str]) -> float | None:
    """Returns the seconds that a process takes; None if it fails."""
    began = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if process.returncode:
        print(process.stdout[-2000:], process.stderr[-2000:], flush=True)
        return None
    return time.monotonic() - began
