"""conf/trainer -> TRL's SFTTrainer on token ids and labels, with evaluation and answers at intervals.

`AdapterTrainer` changes SFTTrainer where a measured gain or a correct number demands it: the loss, which rows share a
micro-batch, and the evaluation. callbacks.py says what follows a step, resumable.py how checkpoints are written and
read. No other package imports TRL.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from medtune.config.schema import RunConfig
from medtune.data.tokenization.dataset import IGNORE_INDEX, TokenizedSplits
from medtune.evaluation.likelihood import Likelihood, likelihood
from medtune.modeling.attention import train_attention, use_attention
from medtune.modeling.lora import adapter
from medtune.modeling.lora.dropout import key_dropout
from medtune.modeling.loss import add_target_loss, find_targets, unwrap_peft
from medtune.modeling.memory import CHECKPOINTING_KWARGS
from medtune.modeling.multi_lora.handle import BaseHandle
from medtune.runtime import interruption
from medtune.training.callbacks import Diverged, StepGuard
from medtune.training.resumable import ResumableTrainer


@dataclass
class TrainingData:
    """What a trainer trains and evaluates on. `baseline`: the base model's losses on the validation set (step 0)."""

    tokenizer: PreTrainedTokenizerBase
    tokens: TokenizedSplits
    baseline: Likelihood


def build_trainer(
    model: PeftModel, data: TrainingData, run: RunConfig, folder: Path, callbacks: Sequence[TrainerCallback]
) -> "AdapterTrainer":
    """Builds the trainer of one run, with its checkpoints in `folder`.

    `run.trainer.gradient_checkpointing` is decided here: null means no.
    """
    config, evaluation = run.trainer, run.eval
    dtype, on_gpu = model.get_base_model().dtype, torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(folder),
        seed=run.seed,
        max_length=None,  # rows fit already: tokenization drops early turns and never cuts an answer
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        per_device_eval_batch_size=evaluation.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type.name,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim.name,
        gradient_checkpointing=bool(config.gradient_checkpointing),
        gradient_checkpointing_kwargs=dict(CHECKPOINTING_KWARGS),
        # Autocast runs the float32 adapter in 16 bits on a GPU. On a CPU it only costs time.
        bf16=on_gpu and dtype is torch.bfloat16,
        fp16=on_gpu and dtype is torch.float16,
        use_cpu=not on_gpu,
        eval_strategy="steps",
        eval_steps=evaluation.every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=evaluation.every,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # the default logs a loss of NaN as 0.0 and trains on
        include_num_input_tokens_seen="no",  # it would synchronize at every micro-batch; `StepGuard` counts
        report_to="none",  # results/tracking.py records, one W&B run per member
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
    # On a machine of several GPUs the Trainer would wrap the model in DataParallel; a run uses one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    patience = config.early_stopping_patience
    stopping = [EarlyStoppingCallback(patience)] if patience else []
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=data.tokens.train.with_format("numpy"),  # a batch of lists of numbers takes ten times as long
        data_collator=collator(data.tokenizer),
        eval_dataset=data.tokens.validation,
        processing_class=data.tokenizer,
        callbacks=[key_dropout(model, run.seed), *callbacks, *stopping],
        baseline=data.baseline,
        group_by_length=config.group_by_length,
        attention=train_attention(run.model, config.max_length, model.device),
    )
    trainer.remove_callback(PrinterCallback)
    adapter.to_float32(model)
    return trainer


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
    """Returns what batches rows: it pads input_ids with the pad token and labels with -100, and adds the mask."""
    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)


class AdapterTrainer(ResumableTrainer):
    """SFTTrainer with the loss on target tokens only, batches grouped by length, and an exact evaluation."""

    def __init__(
        self,
        baseline: Likelihood,
        group_by_length: bool,
        attention: str,
        callbacks: Sequence[TrainerCallback],
        **kwargs: Any,
    ) -> None:
        self.step_guard = StepGuard(self)
        super().__init__(callbacks=[self.step_guard, *callbacks], **kwargs)
        add_target_loss(unwrap_peft(self.model))
        self.baseline, self.group_by_length, self.attention = baseline, group_by_length, attention
        self.handle: BaseHandle | None = None

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Returns the scheduler; warm-up step k of w, from 0, has the share (k + 1) / (w + 1) of the learning rate.

        The stock warm-up begins at 0: its first step changes nothing, and a run of one step trains nothing. A
        checkpoint of the stock schedule resumes with this one; after the warm-up the two are the same.
        """
        fresh = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if fresh and isinstance(scheduler, LambdaLR):
            begin_above_zero(scheduler, self.args.get_warmup_steps(num_training_steps))
        return scheduler

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Returns the negative log-likelihood in nats per target token of the whole effective batch."""
        targets = inputs["targets"]
        summed = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], targets=targets)
        return summed / (len(targets.ids) if num_items_in_batch is None else num_items_in_batch)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Returns the micro-batches of one optimizer step with their target positions, and the count of target tokens.

        Rows of about the same length share a micro-batch, which takes less padding. The rows of the step stay the
        same, and so does its gradient: the loss is a sum over all of them.
        """
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.group_by_length:
            batches = regroup_by_length(batches, cast(int, self.processing_class.pad_token_id))
        # Found now: between micro-batches it would synchronize with the GPU.
        return [batch | {"targets": find_targets(batch["labels"])} for batch in batches], items

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """Runs one forward and backward pass and returns its loss, a scalar."""
        interruption.raise_if_requested()
        with use_attention(unwrap_peft(self.model), self.attention):
            loss = super().training_step(model, inputs, *args)
        if self.handle:
            self.handle.backward()
        self.step_guard.losses.append(loss)
        self.step_guard.tokens.append(inputs["attention_mask"].sum())
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; see `ResumableTrainer.run`."""
        with cached_walks(self.model):
            return super().train(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Counts none: counting walks through all modules in each pass, and means nothing for a frozen base."""
        return 0

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Returns loss, perplexity and token accuracy on the validation set, and passes them to the callbacks.

        Every target token weighs the same. The stock evaluation averages batch means: short answers weigh more, and
        the number depends on the batch size. Raises `Diverged` when the loss is not finite.
        """
        started = time.monotonic()
        rows, batch = cast(Dataset, self.eval_dataset), self.args.per_device_eval_batch_size
        trained = self.state.global_step > 0
        result = likelihood(self.model, rows["input_ids"][:], rows["labels"][:], batch) if trained else self.baseline
        if not math.isfinite(result.loss):
            raise Diverged(f"eval_loss is {result.loss} at step {self.state.global_step}: lower the learning rate")
        metrics = {
            f"{metric_key_prefix}_loss": result.loss,
            f"{metric_key_prefix}_perplexity": result.perplexity,
            f"{metric_key_prefix}_token_accuracy": result.token_accuracy,
            f"{metric_key_prefix}_seconds": time.monotonic() - started,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def begin_above_zero(scheduler: LambdaLR, warmup_steps: int) -> None:
    """Gives the steps of a warm-up that begins at 0 a learning rate each."""

    def raised(stock: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: (step + 1) / (warmup_steps + 1) if step < warmup_steps else stock(step)

    for place, stock in enumerate(scheduler.lr_lambdas):
        if warmup_steps and stock(0) == 0:
            scheduler.lr_lambdas[place] = raised(stock)
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def regroup_by_length(batches: list[dict[str, torch.Tensor]], pad_token_id: int) -> list[dict[str, torch.Tensor]]:
    """Returns the rows of several padded batches in batches of the same sizes, from the longest to the shortest."""
    fills = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "attention_mask": 0}
    if len(batches) < 2 or set(batches[0]) != set(fills):
        return batches
    rows = [row for batch in batches for row in unpadded_rows(batch)]
    rows.sort(key=lambda row: -len(row["input_ids"]))
    grouped, start = [], 0
    for batch in batches:
        end = start + len(batch["input_ids"])
        grouped.append({name: pad_column(rows[start:end], name, fill) for name, fill in fills.items()})
        start = end
    return grouped


def unpadded_rows(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Returns the rows of a batch that is padded on the right, each cut to its own length."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [{name: values[row, :length] for name, values in batch.items()} for row, length in enumerate(lengths)]


def pad_column(rows: list[dict[str, torch.Tensor]], name: str, fill: int) -> torch.Tensor:
    """Returns one column of several rows as a tensor [rows, longest]."""
    return pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)


@contextmanager
def cached_walks(model: PeftModel) -> Iterator[None]:
    """Answers at once what the Trainer asks of a model several times a step: its parameters, and to be in training
    mode. It would walk through thousands of modules each time, which on a GPU takes longer than a pass."""
    parameters, train = list(model.parameters()), model.train
    vars(model)["parameters"] = lambda recurse=True: iter(parameters)
    vars(model)["train"] = lambda mode=True: model if model.training is mode else train(mode)
    try:
        yield
    finally:
        del vars(model)["parameters"], vars(model)["train"]
