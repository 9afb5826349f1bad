"""SFTTrainer that resumes from any interruption; the result equals an uninterrupted run.

A checkpoint is complete or absent, what was due at it is not done twice, and nothing in it names this machine.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from medtune.modeling.lora import adapter
from medtune.results import checkpoints
from medtune.runtime import interruption
from medtune.runtime.errors import RunPaused

# Checkpoints file the state of a callback under its class name: those written by earlier versions have these.
EARLIER_NAMES = {"MetricsCallback": "Report"}


class ResumableTrainer(SFTTrainer):
    """SFTTrainer of an adapter, which resumes from the newest complete checkpoint.

    `pause_at`: the optimizer step after which it stops for now. `evaluating`: whether it is in an evaluation.
    """

    model: PeftModel
    processing_class: PreTrainedTokenizerBase

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pause_at: int | None = None
        self.evaluating = False

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return Path(str(self.args.output_dir))

    def run(self, saved: checkpoints.Saved | None) -> None:
        """Trains, from a checkpoint if there is one, and leaves the best adapter in the model.

        An interruption saves a checkpoint of the last optimizer step. Raises `RunPaused` at `pause_at`, and `NoSpace`
        when a checkpoint cannot be written.
        """
        try:
            if saved is None:
                self.train()
            elif saved.finished:
                self.finish(saved)
            elif self.pause_at is not None and saved.step >= self.pause_at:
                if not saved.evaluated:
                    self.run_missed_evaluation(saved)
                raise RunPaused
            else:
                self.args.eval_on_start = not saved.evaluated
                self.train(resume_from_checkpoint=str(saved.folder))
        except interruption.Interrupted:
            self.pause_at = None  # this is another reason to stop
            self.save_now()
            raise

    def finish(self, saved: checkpoints.Saved) -> None:
        """Does what is left after the last step: the stock trainer would take one step more."""
        self.run_missed_evaluation(saved)
        self._load_best_model()

    def run_missed_evaluation(self, saved: checkpoints.Saved) -> None:
        """Loads a checkpoint's state, and evaluates if the evaluation that was due there is missing."""
        self._init_training_state(saved.state["max_steps"], saved.step, 1, str(saved.folder), None)
        if not saved.evaluated:
            self._load_from_checkpoint(str(saved.folder))
            self._evaluate(None, None, skip_scheduler=True)

    def save_now(self) -> None:
        """Saves a checkpoint of the last optimizer step, unless there is one.

        Between two micro-batches, and in an evaluation, the weights are those of the last step.
        """
        step = self.state.global_step
        if step == 0 or checkpoints.is_complete(self.folder / f"checkpoint-{step}"):
            return
        if self.evaluating:  # an evaluation that was cut short is repeated
            history = self.state.log_history
            history[:] = [entry for entry in history if not (entry["step"] == step and "eval_loss" in entry)]
        self._save_checkpoint(self.model, None)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        self.evaluating = True
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self.evaluating = False
        if skip_scheduler and self.state.global_step:  # one that an interruption had cut short
            self._determine_best_metric(metrics, trial)
            self.state.best_model_checkpoint = self.best_checkpoint()
        return metrics

    def best_checkpoint(self) -> str | None:
        """Returns the folder of the best step's checkpoint; None before there is one."""
        best = self.folder / f"checkpoint-{self.state.best_global_step}"
        return str(best) if best.is_dir() else None

    def _load_callback_state(self) -> None:
        # The stock method builds new callbacks; ours hold open files.
        states = cast(dict[str, Any], self.state.stateful_callbacks)
        for callback in self.callback_handler.callbacks:
            name = type(callback).__name__
            stored = states.get(name, states.get(EARLIER_NAMES.get(name, ""), {}))
            for attribute, value in stored.get("attributes", {}).items():
                setattr(callback, attribute, value)
        self.state.best_model_checkpoint = self.best_checkpoint()  # the folder may have another name today

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
        shutil.rmtree(checkpoint, ignore_errors=True)
        with atomic_checkpoint(checkpoint, self.model):
            super()._save_checkpoint(model, trial)
            checkpoints.write_manifest(checkpoint)
        checkpoints.prune(self.folder, {self.state.global_step, self.state.best_global_step or 0})
        if self.pause_at == self.state.global_step < self.state.max_steps:
            raise RunPaused

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The stock method asks the hub about the base, and pickles the arguments, access tokens included. The
        # tokenizer and the card are left out too: only the adapter that is kept needs them.
        adapter.save_weights(self.model, Path(output_dir or str(self.args.output_dir)))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: `adapter.save` writes the card, and TRL's would name this machine's folders."""


@contextlib.contextmanager
def atomic_checkpoint(checkpoint: Path, model: PeftModel) -> Iterator[None]:
    """Removes what is there of a checkpoint that cannot be written. Raises `NoSpace` where the disk is the reason."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = 12 * trained + 20_000_000  # weights and two moments in float32, and small files
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.require_space(checkpoint.parent, needed)
    try:
        yield
    except Exception:
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoints.require_space(checkpoint.parent, needed)  # PyTorch's own message does not name the disk
        raise
