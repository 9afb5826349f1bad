"""conf/trainer -> TRL's SFTTrainer on token ids and labels, with evaluation and answers at intervals.

The only module that knows TRL. `AdapterTrainer` changes what SFTTrainer does in three places, each for a reason.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from medtune import adapter
from medtune.config import Eval, Trainer
from medtune.likelihood import add_taught_loss, base_of, likelihood
from medtune.tokens import Tokens


class Diverged(Exception):
    """The loss or a gradient is no longer a number; nothing after this step may be kept."""


def build_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    config: Trainer,
    evaluation: Eval,
    seed: int,
    checkpoints: Path,
    callbacks: Sequence[TrainerCallback],
) -> "AdapterTrainer":
    """Build the trainer of one run, on the training and the validation set of `tokens`."""
    dtype, on_gpu = model.get_base_model().dtype, torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        seed=seed,
        max_length=None,  # rows already fit: conversation.tokenize never cuts an answer
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
        gradient_checkpointing=config.gradient_checkpointing,
        # Autocast runs the float32 adapter in 16 bits on a GPU. On a CPU it only costs time.
        bf16=on_gpu and dtype is torch.bfloat16,
        fp16=on_gpu and dtype is torch.float16,
        use_cpu=not on_gpu,
        eval_strategy="steps",
        eval_steps=evaluation.every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=evaluation.every,
        save_total_limit=1,  # the newest, and the best if that is another
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # the default logs a loss of NaN as 0.0 and trains on
        include_num_input_tokens_seen="non_padding",
        report_to="none",  # tracking.py records, one W&B run per member
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
        train_dataset=tokens.train,
        data_collator=collator(tokenizer),
        eval_dataset=tokens.validation,
        processing_class=tokenizer,
        callbacks=[*callbacks, *stopping, StopAtNonFiniteGradient()],
    )
    trainer.remove_callback(PrinterCallback)
    adapter.to_float32(model)
    return trainer


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
    """What makes a batch of rows: pads input_ids with the pad token, labels with -100, and adds the attention mask."""
    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)


class AdapterTrainer(SFTTrainer):
    """SFTTrainer with the loss on taught positions only, an exact evaluation, and checkpoints without surprises."""

    model: PeftModel
    processing_class: PreTrainedTokenizerBase

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        add_taught_loss(base_of(self.model))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean negative log-likelihood in nats per taught token of the whole effective batch."""
        taught = (inputs["labels"][:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        summed = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], taught_labels=inputs["labels"]
        )
        return summed / taught

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass. Raises `Diverged` when the loss is not finite."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise Diverged(f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rate")
        return loss

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss, perplexity and token accuracy on the validation set, told to the callbacks.

        Every taught token weighs the same: the stock evaluation averages batch means, so that short answers weigh more
        and the number depends on the batch size. Raises `Diverged` when the loss is not finite.
        """
        started = time.monotonic()
        rows = cast(Dataset, self.eval_dataset if eval_dataset is None else eval_dataset)
        result = likelihood(self.model, rows["input_ids"][:], rows["labels"][:], self.args.per_device_eval_batch_size)
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

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The stock method asks the hub about the base, and pickles the arguments, tokens and all, beside the weights.
        adapter.save(self.model, self.processing_class, Path(output_dir or str(self.args.output_dir)))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """adapter.save writes the card; TRL's would name this machine's folders."""


class StopAtNonFiniteGradient(TrainerCallback):
    """Stop before a gradient that is not finite reaches the weights."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:  # the gradient scaler meets infinities by design, and skips their step
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not all(torch.isfinite(norm) for norm in torch._foreach_norm(gradients)):
            raise Diverged(f"a gradient is not finite at step {state.global_step + 1}: lower the learning rate")
