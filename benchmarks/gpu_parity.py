"""Members in lockstep against the same runs alone, on this GPU: losses of 20 steps, and the adapters after them."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gpu_speed import void
from gpu_trainers import WARM_UP, Bench, Stopwatch
from training_report import table
from transformers import PreTrainedModel

from medtune.config.schema import RunConfig
from medtune.sweep.lockstep import LockstepGroup, LockstepHandle

STEPS = 20
# They differ in everything that matters to a pass; dropout is on, and a step has two passes.
MEMBERS = [
    ["lora.r=4", "seed=1", "lora.lora_dropout=0.1"],
    ["lora.r=8", "trainer.learning_rate=5e-4", "trainer.weight_decay=0.1", "seed=2"],
    ["lora=attention", "trainer.warmup_ratio=0.4", "trainer.max_grad_norm=0.3"],
    ["lora.r=32", "lora.target_modules=[q_proj,v_proj]", "lora.use_rslora=true", "lora.lora_dropout=0"],
]


@dataclass
class Trained:
    """The result of a member: the loss of every step, and its adapter."""

    losses: list[float] = field(default_factory=list)
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)


def parity(bench: Bench) -> str:
    """Compares on the large model as it is trained, then on the tiny one in float32."""
    exact = bench.run("model=tiny_random", "model.dtype=float32", "quantization=none")
    rows = []
    for label, base, words in (
        (f"{bench.shape.hub_id}, NF4, bfloat16", bench.base("medtune"), []),
        ("tiny, float32", bench.load(exact.model, None), ["model=tiny_random", "model.dtype=float32"]),
    ):
        bench.bases["parity"] = base
        common = [*words, "trainer.gradient_accumulation_steps=2"]
        runs = [bench.run(*common, *member) for member in MEMBERS]
        alone = [train_one(bench, run, None) for run in runs]
        for recomputed in (False, True):
            together = train_in_lockstep(bench, base, runs, recomputed)
            kept = "recomputed" if recomputed else "kept"
            rows.append([label, f"in lockstep, activations {kept}", *differences(alone, together)])
            print(*rows[-1], flush=True)
        rows.append([label, "the first alone, once more", *differences(alone[:1], [train_one(bench, runs[0], None)])])
        print(*rows[-1], flush=True)
    return "\n\n".join(
        [
            "### Members in lockstep beside themselves alone",
            table(["base", "against each of four members alone", "losses", "adapter"], rows),
            f"Largest relative difference of a loss in {STEPS} steps, and of an adapter's tensor (norm of the "
            "difference over the norm). Ranks, targets, rates, schedules, clipping, decay and seeds differ.",
        ]
    )


def train_in_lockstep(bench: Bench, base: PreTrainedModel, runs: list[RunConfig], checkpointing: bool) -> list[Trained]:
    """Trains all members together."""
    bench.collect()
    results: list[Trained | None] = [None] * len(runs)
    waiting = deque(enumerate(runs))

    def next_job() -> Callable[[LockstepHandle], None] | None:
        if not waiting:
            return None
        index, run = waiting.popleft()
        return lambda handle: void(results.__setitem__(index, train_one(bench, run, handle)))

    LockstepGroup(base, len(runs), checkpointing, bench.attention, bench.longest(None)).run(next_job)
    return [trained for trained in results if trained]


def train_one(bench: Bench, run: RunConfig, handle: LockstepHandle | None) -> Trained:
    """Trains a run on the base called parity."""
    watch = Stopwatch(bench, STEPS - WARM_UP)
    trainer = bench.ours(run, None, watch, handle, "parity")
    trainer.train()
    trained = ((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    return Trained(watch.losses, {name: weight.detach().cpu().clone() for name, weight in trained})


def differences(ours: list[Trained], theirs: list[Trained]) -> list[str]:
    """Returns the largest relative differences of losses and of adapters."""
    of_losses, of_adapters = list[float](), list[float]()
    for x, y in zip(ours, theirs, strict=True):
        of_losses += [abs(a - b) / abs(a) for a, b in zip(x.losses, y.losses, strict=True)]
        of_adapters += [float((a - y.adapter[name]).norm() / a.norm()) for name, a in x.adapter.items()]
    return [f"{max(of_losses):.1e}", f"{max(of_adapters):.1e}"]
