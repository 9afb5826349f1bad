"""Where the GPU's time goes in a step of medtune's trainer, by what its operations work on."""

from collections import Counter

import torch
from gpu_speed import flops_per_token, run_of, speed_of, timed
from gpu_trainers import WARM_UP, Bench, Shape, Stopwatch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from training_report import table
from transformers import TrainerCallback

from medtune.config.schema import RunConfig

SHAPES = [Shape(1, 512), Shape(4, 512), Shape(4, 2048)]
STEPS = 3
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_", "aten::matmul", "aten::linear")
OF_KERNELS = ("LoraFunction", "SwiGLU", "Rotary")  # operations whose own time on the GPU is that of `KERNELS`
KERNELS = {
    "dequantize_block": "dequantizing 4-bit weights",
    "drop_block": "dropout",
    "multiply_tile": "dropout and LoRA's first product",
    "differentiate_tile": "dropout and LoRA's first product",
    "multiply_block": "SwiGLU",
    "differentiate_block": "SwiGLU",
    "rotate_block": "rotary positions",
}


class Profiled(TrainerCallback):
    """Profiles the steps after the warm-up."""

    def __init__(self, bench: Bench) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Called by the trainer."""
        step = state.global_step  # type: ignore[attr-defined]
        if step == WARM_UP:
            self.profiler.start()
        elif step == WARM_UP + STEPS:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.profiler.stop()


def profile(bench: Bench) -> str:
    """Measures a step's GPU milliseconds in each kind of operation, beside the whole step and the least by roofline."""
    found: dict[str, Counter[str]] = {}
    whole, least = dict[str, float](), dict[str, float]()
    flops, bandwidth = ceilings(bench)
    for shape in [Shape(1, 32)] if bench.tiny else SHAPES:
        run = run_of(bench, shape, "trainer.gradient_checkpointing=false")
        rate, _ = speed_of(bench, "medtune", run, shape)
        tokens = shape.rows * (shape.length or 0)
        whole[str(shape)] = 1e3 * tokens / rate
        least[str(shape)] = 1e3 * (
            tokens * flops_per_token(bench, shape) / flops + dequantizing_bytes(bench) / bandwidth
        )
        found[str(shape)] = spent_in(bench, run, shape)
        print(shape, whole[str(shape)], least[str(shape)], dict(found[str(shape)]), flush=True)
    kinds = sorted({kind for spent in found.values() for kind in spent}, key=lambda k: -found[list(found)[-1]][k])
    rows = [[kind, *(f"{spent[kind]:.1f}" for spent in found.values())] for kind in kinds]
    rows.append(["all of the GPU's work", *(f"{sum(spent.values()):.1f}" for spent in found.values())])
    rows.append(["a step as it runs", *(f"{value:.1f}" for value in whole.values())])
    rows.append(["the least by the roofline", *(f"{value:.1f}" for value in least.values())])
    return "\n\n".join(
        [
            "### Where the GPU's time goes",
            table(["milliseconds a step", *found], rows),
            "The GPU's work is that of the same step launched kernel by kernel, under the profiler. The least: the "
            f"model's FLOPs at {flops / 1e12:,.0f} TFLOP/s and dequantizing all weights twice at "
            f"{bandwidth / 1e12:.1f} TB/s, as measured here (products of 8,192 x 8,192 numbers, a copy of 2 GB).",
        ]
    )


def spent_in(bench: Bench, run: RunConfig, shape: Shape) -> Counter[str]:
    """Returns the GPU milliseconds in each kind of operation, of a step that is not captured."""
    bench.collect()
    watch, profiled = Stopwatch(bench, STEPS), Profiled(bench)
    trainer = bench.ours(run, shape.length, watch, captured=False)  # a replayed kernel belongs to no operation
    trainer.add_callback(profiled)
    trainer.train()
    spent: Counter[str] = Counter()
    for event in profiled.profiler.key_averages(group_by_input_shape=True):
        if event.device_type == DeviceType.CPU:
            kind = None if event.key.startswith(OF_KERNELS) else kind_of(event.key, event.input_shapes, run, bench)
        else:
            kind = KERNELS.get(event.key)  # other kernels are counted with their operation
        if kind:
            spent[kind] += event.self_device_time_total / 1e3 / STEPS
    return spent


def ceilings(bench: Bench) -> tuple[float, float]:
    """Returns the FLOP/s and bytes/s that this GPU reaches."""
    size, width = (1024, 2**20) if bench.tiny else (8192, 2**30)
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(width, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    rates = []
    for work, amount in ((lambda: torch.mm(a, b), 2 * size**3), (lambda: target.copy_(source), 2 * 2 * width)):
        work()
        seconds = timed(bench, lambda work=work: [work() for _ in range(10)])  # type: ignore[misc]
        rates.append(10 * amount / seconds)
    return rates[0], rates[1]


def dequantizing_bytes(bench: Bench) -> float:
    """Returns the bytes of reading all weights in 4 bits and writing them in 16, forward and backward."""
    return 2 * (0.516 + 2) * (bench.shape.parameters - bench.shape.embedding_parameters)


def kind_of(name: str, shapes: list[list[int]], run: RunConfig, bench: Bench) -> str:
    """Returns what an operation is for, judged by its name and the sizes it works on."""
    config = bench.base("medtune").config
    sizes = {size for shape in shapes if isinstance(shape, list) for size in shape if isinstance(size, int)}
    if "dequant" in name.lower() or "4bit" in name.lower():
        return "dequantizing 4-bit weights"
    if config.vocab_size in sizes:
        return "vocabulary and loss"
    if "attention" in name or "flash" in name.lower():
        return "attention"
    if name in PRODUCTS:
        return "LoRA's products" if run.lora.r in sizes else "products with the base"
    if "adam" in name.lower() or "foreach" in name or ("norm" in name and "layer" not in name):
        return "optimizer and gradient norm"
    return "rest: norms, sums, copies"
