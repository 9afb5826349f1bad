"""LLaMA 3 8B's shapes on one GPU: speed, memory, members in lockstep, parity, evaluation, and a profile.

Command: make bench-gpu, or python benchmarks/gpu.py [--rounds 2] [--only single packed …] [--tiny]

Weights are random: no licence, no download, the same arithmetic. NF4 with double quantization, LoRA of rank 16 on all
linear layers, bfloat16. Both sides are whole trainers, medtune's and TRL's at its defaults. They take turns in one
process, on the same rows. Writes a section of BENCHMARKS.md; --tiny tries the script on a CPU.
"""

import argparse
import logging
import shlex
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from gpu_parity import parity
from gpu_processes import processes
from gpu_profile import profile
from gpu_speed import evaluation, memory, packed, single
from gpu_trainers import MODELS, Bench
from training_cases import ROOT
from training_report import write_section

from medtune.results.run_folder import PACKAGES
from medtune.runtime.environment import git_commit, versions

TITLE = "LLaMA 3 8B's shapes on one GPU"
PARTS = {
    "single": single,
    "memory": memory,
    "packed": packed,
    "parity": parity,
    "evaluation": evaluation,
    "profile": profile,
    "processes": processes,
}


def main() -> None:
    """Measures the chosen parts, one after another, and writes each down as soon as it is known."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=[], help="such as '1 x 512' '2 x conversations'")
    parser.add_argument("--members", nargs="+", type=int, default=[], help="numbers of members in lockstep")
    parser.add_argument("--out", type=Path, default=ROOT / "BENCHMARKS.md")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    logging.getLogger("medtune").setLevel(logging.WARNING)
    # Parts measured on their own have a section of their own.
    title = TITLE if options.only == list(PARTS) else f"{TITLE}: {', '.join(options.only)}"
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(
            MODELS["tiny" if options.tiny else "8B"], Path(temporary), options.rounds, options.shapes, options.members
        )
        texts = [heading(bench, options.out)]
        for name in options.only:
            texts.append(PARTS[name](bench))
            print(f"\n{texts[-1]}", flush=True)
            bench.release()
            write_section(options.out, title, "\n\n".join(texts))


def heading(bench: Bench, out: Path) -> str:
    """Returns the text that names machine, versions, and what was run."""
    words = [word for word in sys.argv[1:] if word not in ("--out", str(out))]
    command = f"python benchmarks/gpu.py {shlex.join(words)}"
    programs = ", ".join(f"{name} {number}" for name, number in versions(PACKAGES).items())
    device = torch.cuda.get_device_name() if bench.on_gpu else "the CPU"
    return f"""\
`{command}` on {date.today():%d %B %Y}, {device}. {programs}; commit {git_commit()}.

{bench.shape.hub_id}: random weights, NF4 with double quantization, LoRA of rank 16 on all linear layers with a dropout
of 0.05, bfloat16, one pass per optimizer step. *Conversations* have the lengths of patients' questions with doctors'
answers (log-normal, median 280 tokens, 95 % up to 650), with a loss on the last 60 % of each. The other shapes are of
one length. The plain script is TRL at its defaults; *recomputed* is gradient checkpointing, TRL's default."""


if __name__ == "__main__":
    main()
