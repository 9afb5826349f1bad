"""Whether packed members are what they are alone, on this GPU: losses of 20 steps, and the adapters after them."""

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
# Different in everything that matters to a pass; dropout on, two passes a step.
MEMBERS = [
    ["lora.r=4", "seed=1", "lora.lora_dropout=0.1"],
    ["lora.r=8", "trainer.learning_rate=5e-4", "trainer.weight_decay=0.1", "seed=2"],
    ["lora=attention", "trainer.warmup_ratio=0.4", "trainer.max_grad_norm=0.3"],
    ["lora.r=32", "lora.target_modules=[q_proj,v_proj]", "lora.use_rslora=true", "lora.lora_dropout=0"],
]


@dataclass
class Trained:
    """What came of a member: the loss of every step, and its adapter."""

    losses: list[float] = field(default_factory=list)
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)


def parity(bench: Bench) -> str:
    """The large model as it is trained, then the tiny one in float32."""
    exact = bench.run("model=tiny_random", "model.dtype=float32", "quantization=none")
    rows = []
    for said, base, words in (
        (f"{bench.shape.hub_id}, NF4, bfloat16", bench.base("medtune"), []),
        ("tiny, float32", bench.load(exact.model, None), ["model=tiny_random", "model.dtype=float32"]),
    ):
        bench.bases["parity"] = base
        common = [*words, "trainer.gradient_accumulation_steps=2"]
        runs = [bench.run(*common, *member) for member in MEMBERS]
        alone = [finished(bench, run, None) for run in runs]
        for recomputed in (False, True):
            together = train_together(bench, base, runs, recomputed)
            kept = "recomputed" if recomputed else "kept"
            rows.append([said, f"packed, activations {kept}", *apart(alone, together)])
            print(*rows[-1], flush=True)
        rows.append([said, "the first alone, once more", *apart(alone[:1], [finished(bench, runs[0], None)])])
        print(*rows[-1], flush=True)
    return "\n\n".join(
        [
            "### Packed members beside themselves alone",
            table(["base", "against each of four members alone", "losses", "adapter"], rows),
            f"Largest relative difference of a loss in {STEPS} steps, and of an adapter's tensor (norm of the "
            "difference over the norm). Ranks, targets, rates, schedules, clipping, decay and seeds differ.",
        ]
    )


def train_together(bench: Bench, base: PreTrainedModel, runs: list[RunConfig], checkpointing: bool) -> list[Trained]:
    """Train all members in one pack."""
    bench.collect()
    found: list[Trained | None] = [None] * len(runs)
    waiting = deque(enumerate(runs))

    def next_job() -> Callable[[LockstepHandle], None] | None:
        if not waiting:
            return None
        place, run = waiting.popleft()
        return lambda lane: void(found.__setitem__(place, finished(bench, run, lane)))

    LockstepGroup(base, len(runs), checkpointing, bench.attention, bench.longest(None)).run(next_job)
    return [trained for trained in found if trained]


def finished(bench: Bench, run: RunConfig, handle: LockstepHandle | None) -> Trained:
    """What came of a run on the base called parity."""
    watch = Stopwatch(bench, STEPS - WARM_UP)
    trainer = bench.ours(run, None, watch, handle, "parity")
    trainer.train()
    trained = ((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    return Trained(watch.losses, {name: weight.detach().cpu().clone() for name, weight in trained})


def apart(ours: list[Trained], theirs: list[Trained]) -> list[str]:
    """The largest relative differences of losses and adapters."""
    losses = max(
        abs(a - b) / abs(a) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x.losses, y.losses, strict=True)
    )
    adapters = max(
        ((x.adapter[name] - y.adapter[name]).norm() / x.adapter[name].norm()).item()
        for x, y in zip(ours, theirs, strict=True)
        for name in x.adapter
    )
    return [f"{losses:.1e}", f"{adapters:.1e}"]
