"""What members cost that train together on one GPU: LLaMA 3 8B in NF4, one member against 2, 4, 8 and 16 in a pack.

Command: make bench-gpu, or python tests/bench/gpu.py [--out FOLDER] [--steps 3] [--tiny]

The shapes of LLaMA 3 8B with random weights: no network, no licence, the same arithmetic. A step is forward, backward
and AdamW of one micro-batch for every member, with an adapter of rank 16 on all linear layers, dropout, activations
recomputed, and the loss on the taught 60 % of the tokens. Writes gpu.json and gpu.md; --tiny tries the script on a CPU.
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import bitsandbytes
import torch
import torch.nn.functional as F
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from medtune import adapter
from medtune.config import Lora
from medtune.dropout import key_dropout
from medtune.model import view
from medtune.sweep.pack import Lane, Pack

MEMBERS = (1, 2, 4, 8, 16)  # 1: alone, in no pack
SHAPES = [(1, 512), (2, 512), (1, 2048), (2, 2048)]  # rows, tokens of a micro-batch
WARM_UP = 1  # steps
TAUGHT = 0.6  # share of the tokens
PIECE = 256  # taught positions whose logits exist at the same time
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@dataclass
class Row:
    """A measurement. `together`: members that went through the base at a time, fewer where memory ran out."""

    rows: int
    length: int
    members: int
    together: int
    step_seconds: float
    tokens_per_second: float
    times_one_member: float
    peak_gb: float


def main() -> None:
    """Measure every shape with every number of members."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = random_base(TINY if options.tiny else LLAMA3_8B, device)
    found: list[Row] = []
    for rows, length in [(1, 16), (2, 32)] if options.tiny else SHAPES:
        for members in MEMBERS:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds, together = measure(base, members, rows, length, options.steps)
            rate = members * rows * length / seconds
            alone = next((row.tokens_per_second for row in found if (row.rows, row.length) == (rows, length)), rate)
            peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
            found.append(Row(rows, length, members, together, seconds, rate, rate / alone, peak))
            print(found[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }
    result = {**machine, "measurements": [asdict(row) for row in found]}
    (options.out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    text = ", ".join(machine.values()) + "\n\n" + table(found) + "\n"
    (options.out / "gpu.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


def random_base(config: LlamaConfig, device: torch.device) -> PreTrainedModel:
    """A frozen Llama with random weights, its linear layers in NF4 with double quantization, the rest in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        base = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    base.requires_grad_(False)
    for name, module in list(base.base_model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            sizes = module.in_features, module.out_features
            layer = Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
            layer.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            layer.support_avx512bf16_for_cpu = False
            parent, _, own = name.rpartition(".")
            setattr(base.base_model.get_submodule(parent), own, layer.to(device))
            module.weight.data = torch.empty(0)
    base.is_loaded_in_4bit = True  # PEFT looks here
    return base


def measure(base: PreTrainedModel, members: int, rows: int, length: int, steps: int) -> tuple[float, int]:
    """Seconds of a step of all members, and how many of them went through the base at a time."""
    ends: list[list[float]] = [[] for _ in range(members)]  # of every step, by member
    if members == 1:
        net = view(base)
        net.gradient_checkpointing_enable({"use_reentrant": False})
        train(net, lambda: None, 0, rows, length, steps, ends[0])
        together = 1
    else:
        pack = Pack(base, width=members, checkpointing=True, attention="sdpa")
        waiting = deque(range(members))

        def next_job() -> Callable[[Lane], None] | None:
            if not waiting:
                return None
            member = waiting.popleft()
            return lambda lane: train(lane.view(), lane.backward, member, rows, length, steps, ends[member])

        pack.run(next_job)
        together = pack.together
    first, last = (max(times[step] for times in ends) for step in (WARM_UP - 1, -1))
    return (last - first) / steps, together


def train(
    net: PreTrainedModel, through_base: Callable[[], None], seed: int, rows: int, length: int, steps: int,
    ends: list[float],
) -> None:  # fmt: skip
    """Train a member and note when each of its steps ended. `through_base`: what follows its own backward pass."""
    tuned = adapter.attach(net, Lora(16, 32, 0.05, LAYERS, use_dora=False, use_rslora=False), seed).train()
    key_dropout(tuned, seed)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-4)
    ids = torch.randint(0, net.config.vocab_size, (rows, length), device=net.device)
    for _ in range(WARM_UP + steps):
        with torch.autocast(net.device.type, dtype=torch.bfloat16, enabled=net.device.type == "cuda"):
            loss = taught_loss(tuned, ids)
        loss.backward()
        through_base()
        optimizer.step()
        optimizer.zero_grad()
        if net.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.monotonic())


def taught_loss(tuned: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Nats per taught token, as in training: only they go through the vocabulary projection, some at a time."""
    base = tuned.get_base_model()
    first = int(ids.shape[1] * (1 - TAUGHT))
    hidden = base.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    hidden, targets = hidden[:, first:-1].flatten(0, 1), ids[:, first + 1 :].flatten()
    parts = zip(hidden.split(PIECE), targets.split(PIECE), strict=True)
    summed = [F.cross_entropy(base.lm_head(h).float(), ids, reduction="sum") for h, ids in parts]
    return torch.stack(summed).sum() / len(targets)


def table(found: list[Row]) -> str:
    """The measurements as Markdown."""
    lines = [
        [
            f"{row.rows} x {row.length}",
            row.members if row.together >= row.members else f"{row.members} ({row.together} at a time)",
            f"{row.step_seconds:.3f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.times_one_member:.2f}",
            f"{row.peak_gb:.1f}",
        ]
        for row in found
    ]
    headers = ["rows x tokens", "members", "seconds a step", "tokens/s", "times one member's", "peak GB"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
