"""The two sides of benchmarks/gpu.py: medtune's trainer and TRL's plain one, on the same rows of the same shapes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from datasets import Dataset
from plain import plain_trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import SFTTrainer

from medtune.config.groups import CONF, register
from medtune.config.schema import Model, Quantization, RunConfig
from medtune.config.validation import build_config
from medtune.data.tokenization.dataset import IGNORE_INDEX, TokenizedSplits
from medtune.evaluation.likelihood import Likelihood
from medtune.modeling import base as model
from medtune.modeling.attention import train_attention
from medtune.modeling.cuda_graphs import CAPTURE_THREAD
from medtune.modeling.frozen_base import share_weights
from medtune.modeling.lora import adapter
from medtune.modeling.memory import free_memory
from medtune.modeling.multi_lora.backbone import Backbone
from medtune.modeling.multi_lora.captured import bucket
from medtune.modeling.multi_lora.exclusive import ExclusiveHandle
from medtune.modeling.tokenizer import load_tokenizer
from medtune.runtime.logs import silence_libraries
from medtune.sweep.lockstep import LockstepHandle
from medtune.training.trainer import AdapterTrainer, TrainingData, build_trainer

MODELS = {"8B": "llama3_8b_random", "tiny": "tiny_random"}
QUESTION_SHARE = 0.4  # of a row's tokens, without a loss
WARM_UP = 2  # steps
NEVER = 100_000  # a step that no run reaches: nothing is saved or evaluated before it
BASELINE = Likelihood(*(np.ones(1) for _ in range(3)))  # a stand-in: the base model is not evaluated


@dataclass
class Shape:
    """Rows of a micro-batch, and their length in tokens; None: the lengths of conversations."""

    rows: int
    length: int | None

    def __str__(self) -> str:
        return f"{self.rows} x {self.length or 'conversations'}"


class Bench:
    """The base models that are measured, and runs on them."""

    def __init__(
        self, name: str, folder: Path, rounds: int, only: Sequence[str] = (), members: Sequence[int] = ()
    ) -> None:
        self.rounds = rounds  # the sides in one order, then in the other
        self.only, self.members = only, members  # chosen shapes and numbers of members; none: all
        silence_libraries()
        register()
        self.name, self.folder = name, folder
        self.on_gpu = torch.cuda.is_available()
        self.tiny = name == MODELS["tiny"]
        self.shape: Model = self.run().model
        self.device = model.device_for(self.shape)
        self.attention = train_attention(self.shape, 2048, self.device)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.shape)
        self.bases: dict[str, PreTrainedModel] = {}
        self.footprint: dict[str, int] = {}
        self.capture_seconds: list[float] = []  # of each shape

    def run(self, *words: str) -> RunConfig:
        """Returns the run that these overrides give, of one pass a step."""
        common = [
            f"model={self.name}", "lora=all_linear", "trainer.optim=adamw_torch_fused", "trainer.max_length=2048",
            f"trainer.max_steps={NEVER}", f"eval.every={NEVER}", "trainer.gradient_accumulation_steps=1",
            "trainer.warmup_ratio=0", "trainer.learning_rate=2e-4", "wandb=disabled",
        ]  # fmt: skip
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return build_config(hydra.compose("train", [*common, *words]), RunConfig)

    def shapes(self, known: Sequence[Shape]) -> list[Shape]:
        """Returns the shapes that were chosen."""
        return [shape for shape in known if not self.only or str(shape) in self.only]

    def base(self, side: str) -> PreTrainedModel:
        """Returns a side's own base model, loaded once: neither trainer sees what the other did to it."""
        if side not in self.bases:
            before = self.allocated()
            run = self.run()
            self.bases[side] = self.load(run.model, run.quantization)
            self.footprint[side] = self.allocated() - before
        return self.bases[side]

    def load(self, shape: Model, quantization: Quantization | None) -> PreTrainedModel:
        """Returns a frozen base model."""
        return model.load_base(shape, quantization, self.tokenizer, self.device)

    def release(self) -> None:
        """Frees the base models."""
        self.bases.clear()
        self.collect()

    def collect(self) -> None:
        """Frees unused memory, and starts a new peak."""
        free_memory()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> int:
        """Returns the bytes of tensors on the GPU."""
        return torch.cuda.memory_allocated() if self.on_gpu else 0

    def peak(self, side: str) -> tuple[float, float]:
        """Returns the most gigabytes that tensors took, and that PyTorch held, since the last `collect`.

        The base models of other sides are left out.
        """
        others = sum(size for name, size in self.footprint.items() if name != side and name in self.bases)
        if not self.on_gpu:
            return 0.0, 0.0
        return (torch.cuda.max_memory_allocated() - others) / 1e9, (torch.cuda.max_memory_reserved() - others) / 1e9

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()

    @cache  # noqa: B019  # there is one bench
    def rows(self, length: int | None, count: int = 128) -> list[dict[str, list[int]]]:
        """Returns rows of random token ids with their labels. Conversations have the lengths of HealthCareMagic's."""
        generator = np.random.default_rng(0)
        lengths = np.exp(generator.normal(5.63, 0.52, count)).clip(64, 1024).astype(int) if length is None else None
        if self.tiny:
            lengths, count = generator.integers(16, 33, 64), 64
        vocabulary = len(self.tokenizer)
        rows = []
        for index in range(count):
            size = length if lengths is None else int(lengths[index])
            ids = generator.integers(10, vocabulary, size).tolist()
            question = int(QUESTION_SHARE * len(ids))
            rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * question + ids[question:]})
        return rows

    def longest(self, length: int | None) -> int:
        """Returns the length in tokens of the longest row."""
        return max(len(row["input_ids"]) for row in self.rows(length))

    def ours(
        self,
        run: RunConfig,
        length: int | None,
        watch: "Stopwatch",
        handle: LockstepHandle | ExclusiveHandle | None = None,
        side: str = "medtune",
        captured: bool = True,
    ) -> AdapterTrainer:
        """Returns medtune's trainer of a run, alone on a side's base or in lockstep."""
        checkpointing = bool(run.trainer.gradient_checkpointing)
        if handle is None and self.on_gpu:
            handle = ExclusiveHandle(self.base(side), checkpointing, self.attention, self.longest(length))
            handle.backbone.can_capture = captured
        tuned = adapter.add_lora(handle.view() if handle else share_weights(self.base(side)), run.lora, run.seed)
        rows = Dataset.from_list(self.rows(length))
        few = rows.select(range(1))
        checkpointing = handle.checkpointing if handle else checkpointing
        settings = replace(run.trainer, gradient_checkpointing=checkpointing)
        run = replace(run, trainer=settings)
        tokens, folder = TokenizedSplits(rows, few, few, [], []), self.folder / "ours"
        trainer = build_trainer(tuned, TrainingData(self.tokenizer, tokens, BASELINE), run, folder, [watch])
        if handle:
            trainer.handle = handle
            backbone = handle.backbone if isinstance(handle, ExclusiveHandle) else handle.pack.backbone
            watch.before = lambda: self.capture(backbone, length)
        watch.watch(trainer)
        return trainer

    def capture(self, backbone: Backbone, length: int | None) -> None:
        """Captures every shape that the rows have; a long run has done so in its first minute."""
        if backbone.captured:
            count, _ = next(iter(backbone.captured.passes))
            for filled in sorted({bucket(len(row["input_ids"])) for row in self.rows(length)}, reverse=True):
                if (count, filled) not in backbone.captured.passes:
                    began = time.monotonic()
                    CAPTURE_THREAD.run(partial(backbone.captured.capture, (count, filled)))
                    self.capture_seconds.append(time.monotonic() - began)

    def plain(self, run: RunConfig, length: int | None, watch: "Stopwatch") -> SFTTrainer:
        """Returns TRL's trainer of the same run; what the run leaves open has TRL's defaults."""
        set_seed(run.seed)
        rows, config = self.rows(length), run.trainer
        trainer = plain_trainer(
            share_weights(self.base("plain")),
            self.tokenizer,
            {"train": rows, "validation": rows[:1]},
            run.lora.r,
            run.lora.lora_dropout,
            output_dir=str(self.folder / "plain"),
            max_steps=NEVER,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_ratio,
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_checkpointing=config.gradient_checkpointing is not False,
            seed=run.seed,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        watch.watch(trainer)
        return trainer


class Stopwatch(TrainerCallback):
    """Times the steps after the warm-up, counts their tokens, and ends training. Nothing is saved."""

    def __init__(self, bench: Bench, steps: int) -> None:
        self.bench, self.steps = bench, steps
        self.before: Callable[[], None] = lambda: None  # runs between the warm-up and the measurement
        self.began = self.ended = 0.0
        self.passed: list[torch.Tensor] = []  # tokens of every micro-batch, padding left out
        self.losses: list[float] = []

    def watch(self, trainer: SFTTrainer) -> None:
        """Counts the tokens of a trainer's micro-batches."""
        step = trainer.training_step

        def training_step(net: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
            self.passed.append(inputs["attention_mask"].sum())
            return step(net, inputs, *args)

        trainer.training_step = training_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the clock. Synchronizes with the GPU only before the first and after the last measured step."""
        if state.global_step == WARM_UP:
            self.before()
            self.bench.synchronize()
            self.began = time.monotonic()
        elif state.global_step == WARM_UP + self.steps:
            self.bench.synchronize()
            self.ended = time.monotonic()
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keeps a step's loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    @property
    def tokens(self) -> int:
        """Returns the tokens of the measured steps."""
        return int(sum(self.passed[WARM_UP * len(self.passed) // (WARM_UP + self.steps) :]))
