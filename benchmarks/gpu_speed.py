"""Speed and memory: one run beside the plain script, members in lockstep, evaluation and answers."""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from gpu_trainers import Bench, Shape, Stopwatch
from peft import PeftModel
from training_report import table

from medtune.config.schema import RunConfig
from medtune.evaluation.likelihood import likelihood
from medtune.modeling.frozen_base import share_weights
from medtune.modeling.generation import greedy
from medtune.modeling.lora import adapter
from medtune.modeling.memory import training_bytes
from medtune.sweep.lockstep import LockstepGroup, LockstepHandle

STEPS = 6
MEMBERS = (1, 2, 4, 8, 16)  # 1: alone
SINGLE = [Shape(rows, length) for length in (None, 512) for rows in (1, 2, 4, 8)] + [Shape(1, 2048), Shape(4, 2048)]
PACKED = [Shape(1, None), Shape(2, None), Shape(1, 512), Shape(2, 512)]
TINY = [Shape(1, 32), Shape(2, None)]
FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # dense bfloat16, by NVIDIA's data sheet


def run_of(bench: Bench, shape: Shape, *words: str) -> RunConfig:
    """Returns a run of that shape; the estimate of its memory reads `trainer.max_length`."""
    rows = f"trainer.per_device_train_batch_size={shape.rows}"
    return bench.run(rows, f"trainer.max_length={max(bench.longest(shape.length), 16)}", *words)


def single(bench: Bench) -> str:
    """Measures one run of both sides in every shape."""
    rows = []
    for shape in bench.shapes(TINY if bench.tiny else SINGLE):
        for recomputed in (True, False):
            run = run_of(bench, shape, f"trainer.gradient_checkpointing={str(recomputed).lower()}")
            rates: dict[str, list[float]] = defaultdict(list)
            peaks, losses = dict[str, tuple[float, float]](), dict[str, list[float]]()
            for turn in range(bench.rounds):
                for side in ("plain", "medtune")[:: 1 if turn % 2 == 0 else -1]:
                    rate, losses[side] = speed_of(bench, side, run, shape)
                    rates[side].append(rate)
                    peaks[side] = bench.peak(side)
            theirs, ours = (median(rates[side]) for side in ("plain", "medtune"))
            most = FLOPS.get(torch.cuda.get_device_name()) if bench.on_gpu else None
            used = f"{ours * flops_per_token(bench, shape) / most:.0%}" if most else "-"
            words = "recomputed" if recomputed else "kept"
            times = f"{ours / theirs:.2f}" if theirs else "-"
            apart = max((abs(a / b - 1) for a, b in zip(losses["medtune"], losses["plain"], strict=False)), default=0)
            speeds = [f"{theirs:,.0f}", f"{ours:,.0f}", times, f"{apart:.1e}", used]
            rows.append([shape, words, *speeds, *map(format_peak, (peaks["plain"], peaks["medtune"]))])
            print(*rows[-1], flush=True)
    headers = ["rows x tokens", "activations", "plain tokens/s", "medtune tokens/s", "times plain"]
    return "\n\n".join(
        [
            "### One run beside the plain script",
            table([*headers, "losses apart", "of the peak FLOP/s", "plain peak GB (held)", "medtune's"], rows),
            f"Medians of {bench.rounds} times {STEPS} steps; tokens without padding. Losses apart: the largest "
            "relative difference of a step's loss; the sides' dropout differs. FLOP/s are those of the model, a "
            "recomputation left out, in shares of what the data sheet says. Peak: of the tensors, and (held) of what "
            "PyTorch took for them. medtune captures each shape of a pass once, which is not in the times: it took "
            f"{median(bench.capture_seconds or [0]):.1f} s, at most {max(bench.capture_seconds or [0]):.1f} s.",
        ]
    )


def memory(bench: Bench) -> str:
    """Compares the memory that is estimated for a run of every shape with what it takes."""
    rows = []
    for shape in bench.shapes(TINY if bench.tiny else SINGLE):
        for recomputed in (True, False):
            run = run_of(bench, shape, f"trainer.gradient_checkpointing={str(recomputed).lower()}")
            speed_of(bench, "medtune", run, shape, steps=1)
            used, held = bench.peak("medtune")
            estimate = (bench.footprint["medtune"] + training_bytes(run, bench.base("medtune"), recomputed)) / 1e9
            apart = f"{estimate / used - 1:+.0%}" if used else "-"
            words = "recomputed" if recomputed else "kept"
            rows.append([shape, words, f"{estimate:.2f}", f"{used:.2f}", apart, f"{held:.2f}"])
            print(*rows[-1], flush=True)
    return "\n\n".join(
        [
            "### The estimate of memory by which members are planned",
            table(["rows x tokens", "activations", "estimated GB", "used GB", "difference", "held GB"], rows),
            "Used: the most that tensors took at a time. Held: what PyTorch took from the GPU for them.",
        ]
    )


def format_peak(peak: tuple[float, float]) -> str:
    """Returns the gigabytes that were used, and held, as text."""
    return f"{peak[0]:.1f} ({peak[1]:.1f})"


def speed_of(bench: Bench, side: str, run: RunConfig, shape: Shape, steps: int = STEPS) -> tuple[float, list[float]]:
    """Returns the tokens per second of one side, 0 when it runs out of memory; and the loss of every step."""
    bench.base(side)
    bench.collect()
    watch = Stopwatch(bench, steps)
    try:
        (bench.plain if side == "plain" else bench.ours)(run, shape.length, watch).train()
    except torch.OutOfMemoryError:
        return 0.0, []
    return watch.tokens / (watch.ended - watch.began), watch.losses


def flops_per_token(bench: Bench, shape: Shape) -> float:
    """Returns the model's FLOPs, forward and backward to the activations: frozen weights take no gradient.

    2 for each weight forward and 2 backward, the vocabulary for target tokens only; attention as in Korthikanti et al.
    (arXiv:2205.05198, appendix A), of which a causal mask needs half.
    """
    config, lengths = bench.base("medtune").config, [len(row["input_ids"]) for row in bench.rows(shape.length)]
    weights = bench.shape.parameters - bench.shape.embedding_parameters
    head = 0.6 * config.vocab_size * config.hidden_size
    attended = sum(length**2 for length in lengths) / sum(lengths)
    return 4 * (weights + head) + 6 * config.num_hidden_layers * config.hidden_size * attended


def packed(bench: Bench) -> str:
    """Measures members in one pass, against one after another on the same base."""
    rows = []
    for shape in bench.shapes(TINY if bench.tiny else PACKED):
        alone = 0.0
        for members in bench.members or MEMBERS:
            seconds, tokens, together, peak = lockstep_of(bench, shape, members)
            rate = tokens / seconds
            alone = alone or rate
            count = members if together >= members else f"{members} ({together} at a time)"
            rows.append([shape, count, f"{rate:,.0f}", f"{rate / alone:.2f}", format_peak(peak)])
            print(*rows[-1], flush=True)
    return "\n\n".join(
        [
            "### Members in one pass through the base",
            table(["rows x tokens", "members", "tokens/s of all", "times one after another", "peak GB (held)"], rows),
            "Members of rank 16, activations kept; all of one seed, as where anything else is swept: they draw the "
            "same rows. One member alone is what each is one after another on the base.",
        ]
    )


def lockstep_of(bench: Bench, shape: Shape, members: int) -> tuple[float, int, int, tuple[float, float]]:
    """Returns seconds and tokens of all members' measured steps, how many shared a pass, and the peak memory."""
    base = bench.base("medtune")
    bench.collect()
    watches = [Stopwatch(bench, STEPS) for _ in range(members)]
    runs = deque(run_of(bench, shape, "trainer.gradient_checkpointing=false") for _ in range(members))
    together = 1
    if members == 1:
        bench.ours(runs[0], shape.length, watches[0]).train()
    else:
        group = LockstepGroup(base, members, False, bench.attention, bench.longest(shape.length))
        waiting = deque(watches)

        def next_job() -> Callable[[LockstepHandle], None] | None:
            if not runs:
                return None
            run, watch = runs.popleft(), waiting.popleft()
            return lambda handle: void(bench.ours(run, shape.length, watch, handle).train())

        group.run(next_job)
        together = group.together
    seconds = max(watch.ended for watch in watches) - max(watch.began for watch in watches)
    return seconds, sum(watch.tokens for watch in watches), together, bench.peak("medtune")


def void(_: object) -> None:
    """Returns nothing: what a job returned would hold its model."""


def evaluation(bench: Bench) -> str:
    """Measures the loss of 64 rows and greedy answers of 32 tokens, in batches of 8 and 32."""
    tuned = adapter.add_lora(share_weights(bench.base("medtune")), bench.run().lora, 0).eval()
    rows, longest = bench.rows(None)[:64], 8 if bench.tiny else 32
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    prompts = [row[:128] for row in ids[:32]]
    found = []
    for batch in (8, 32):
        parts = [prompts[start : start + batch] for start in range(0, 32, batch)]
        work: dict[str, Callable[[], object]] = {
            "loss": partial(likelihood, tuned, ids, labels, batch),
            "answers": lambda parts=parts: [greedy(tuned, part, [], longest) for part in parts],
            "generate": lambda parts=parts: [generate(bench, tuned, part, longest) for part in parts],
        }
        likelihood(tuned, ids[:batch], labels[:batch], batch)  # the first of anything takes longer
        greedy(tuned, parts[0], [], longest)
        generate(bench, tuned, parts[0], 2)
        seconds = {name: timed(bench, each) for name, each in work.items()}
        tokens = sum(map(len, ids))
        answered = [f"{32 * longest / seconds[name]:,.0f}" for name in ("answers", "generate")]
        found.append([batch, f"{tokens / seconds['loss']:,.0f}", *answered])
        print(*found[-1], flush=True)
    return "\n\n".join(
        [
            "### Evaluation",
            table(["batch", "tokens/s of the loss", "tokens/s answered", "by transformers' generate"], found),
            f"64 conversations for the loss; 32 prompts of up to 128 tokens, {longest} tokens answered to each.",
        ]
    )


def timed(bench: Bench, work: Callable[[], object]) -> float:
    """Returns the seconds that `work` takes, the GPU's part included."""
    bench.synchronize()
    began = time.monotonic()
    work()
    bench.synchronize()
    return time.monotonic() - began


def generate(bench: Bench, tuned: PeftModel, prompts: list[list[int]], longest: int) -> None:
    """Runs transformers' own greedy generation of `longest` tokens; prompts are padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=bench.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=bench.device)
    words = {"min_new_tokens": longest, "max_new_tokens": longest, "do_sample": False}
    with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.on_gpu):
        tuned.generate(input_ids=ids, attention_mask=mask, **words)
