"""Where the GPU's time goes in a step of medtune's trainer, by what its operations work on."""

import time
from collections import Counter

import torch
from gpu_speed import run_of
from gpu_trainers import WARM_UP, Bench, Shape, Stopwatch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from training_report import table
from transformers import TrainerCallback

SHAPES = [Shape(1, 512), Shape(4, 512), Shape(4, 2048)]
STEPS = 3
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear")


class Profiled(TrainerCallback):
    """Profiles the steps after the warm-up."""

    def __init__(self, bench: Bench) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self.seconds = 0.0

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Called by the trainer."""
        step = state.global_step  # type: ignore[attr-defined]
        if step == WARM_UP:
            self.profiler.start()
            self.seconds = time.monotonic()
        elif step == WARM_UP + STEPS:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.monotonic() - self.seconds
            self.profiler.stop()


def profile(bench: Bench) -> str:
    """Milliseconds of the GPU in each kind of operation, of a step."""
    found: dict[str, Counter[str]] = {}
    for shape in [Shape(1, 32)] if bench.tiny else SHAPES:
        bench.collect()
        run = run_of(bench, shape, "trainer.gradient_checkpointing=false")
        watch, profiled = Stopwatch(bench, STEPS), Profiled(bench)
        trainer = bench.ours(run, shape.length, watch)
        trainer.add_callback(profiled)
        trainer.train()
        spent: Counter[str] = Counter()
        for event in profiled.profiler.key_averages(group_by_input_shape=True):
            if event.device_type is not DeviceType.CPU:
                continue  # a kernel, which its operation has already counted
            kind = kind_of(event.key, event.input_shapes, run.lora.r, bench)
            spent[kind] += event.self_device_time_total / 1e3 / STEPS
        spent["the GPU idle (profiler on)"] = 1e3 * profiled.seconds / STEPS - sum(spent.values())
        found[str(shape)] = spent
        print(shape, dict(spent), flush=True)
    kinds = sorted({kind for spent in found.values() for kind in spent}, key=lambda k: -found[list(found)[-1]][k])
    rows = [[kind, *(f"{spent[kind]:.1f}" for spent in found.values())] for kind in kinds]
    return "\n\n".join(["### Where the GPU's time goes", table(["milliseconds a step", *found], rows)])


def kind_of(name: str, shapes: list[list[int]], rank: int, bench: Bench) -> str:
    """What an operation is for, from its name and the sizes it works on."""
    config = bench.base("medtune").config
    sizes = {size for shape in shapes if isinstance(shape, list) for size in shape if isinstance(size, int)}
    if "dequant" in name.lower() or "4bit" in name.lower():
        return "unpacking 4-bit weights"
    if config.vocab_size in sizes:
        return "vocabulary and loss"
    if "attention" in name or "flash" in name.lower():
        return "attention"
    if name in PRODUCTS:
        return "LoRA's products" if rank in sizes else "products with the base"
    if "adam" in name.lower() or "foreach" in name or ("norm" in name and "layer" not in name):
        return "optimizer and gradient norm"
    return "rest: norms, activations, dropout, copies"
