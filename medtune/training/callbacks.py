"""What follows an optimizer step: a check that its numbers are finite, and the record of them.

`StepGuard` stops a run whose loss is no longer a number. `MetricsCallback` records numbers and answers.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from medtune.config.schema import Eval
from medtune.evaluation.answers import Answer, Question, answer
from medtune.evaluation.metrics import lexical
from medtune.evaluation.safety.rubric import judge, passes
from medtune.modeling.memory import peak_memory_gb
from medtune.results.tracking import Tracker
from medtune.runtime.files import write_json
from medtune.runtime.progress import OnProgress

if TYPE_CHECKING:
    from medtune.modeling.multi_lora.handle import BaseHandle

log = logging.getLogger(__name__)

ANSWERING_SHARE = 0.2  # share of the training time from which on the log says how to make answers cheaper


class Diverged(Exception):
    """The loss or a gradient is no longer a number; nothing after this step may be kept."""


class HasHandle(Protocol):
    """A trainer that may share its base model with others."""

    handle: "BaseHandle | None"


class StepGuard(TrainerCallback):
    """Checks every optimizer step of a trainer and counts its tokens.

    Synchronizes with the GPU once per step, after all of its work is queued. (bitsandbytes' optimizers synchronize at
    each tensor all the same, and the gradient scaler of fp16 once.)

    `losses` and `tokens` hold a scalar tensor for each micro-batch of the step. `verdict` is a tensor [3]: the tokens
    of the step, whether its losses are finite, and whether its gradients are.
    """

    verdict: torch.Tensor

    def __init__(self, trainer: HasHandle) -> None:
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Queues, while there are gradients, what `on_step_end` reads."""
        losses, tokens = torch.stack(self.losses), torch.stack(self.tokens).sum()
        self.losses, self.tokens = [], []
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        # With fp16 the gradient scaler meets infinities by design, and skips their step.
        norms = torch.zeros(1, device=losses.device) if args.fp16 else torch.stack(torch._foreach_norm(grads))
        self.verdict = torch.stack([tokens, torch.isfinite(losses).all(), torch.isfinite(norms).all()])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises `Diverged` when a number is not finite: the weights are spoiled, and are not saved or evaluated."""
        if self.trainer.handle:
            self.trainer.handle.yield_turn()
        tokens, loss_is_finite, gradient_is_finite = self.verdict.tolist()
        state.num_input_tokens_seen += tokens
        if not (loss_is_finite and gradient_is_finite):
            what = "a gradient is not finite" if loss_is_finite else "the loss is not finite"
            raise Diverged(f"{what} at step {state.global_step}: lower the learning rate")


@dataclass
class Audience:
    """Who hears what happens in a run: its tracker, metrics.json, and `on_progress`, which takes fields of
    MemberProgress."""

    tracker: Tracker
    metrics_file: Path
    on_progress: OnProgress


class MetricsCallback(TrainerCallback, ExportableState):
    """Records numbers at every log and answers at every evaluation, and reports progress.

    `baseline`: the answers of the base model, recorded at step 0. Its own counts are kept in checkpoints.
    """

    def __init__(
        self,
        audience: Audience,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        baseline: Sequence[Answer],
        evaluation: Eval,
    ) -> None:
        self.audience, self.tokenizer, self.questions, self.baseline = audience, tokenizer, questions, baseline
        self.evaluation = evaluation
        # step, eval_loss, perplexity and token_accuracy of each evaluation; step 0 is the base model
        self.evaluations: list[dict[str, float]] = []
        self.seconds = 0.0  # in training steps alone, without evaluations
        self.answering = 0.0  # seconds
        self.tokens = 0
        self.logged = [0.0, 0]  # seconds and tokens at the last log
        self.started, self.first_step, self.step_started = time.monotonic(), 0, 0.0

    def state(self) -> dict[str, Any]:
        """Returns what goes into a checkpoint."""
        kept = ("evaluations", "seconds", "answering", "tokens", "logged")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in kept}}

    @property
    def tokens_per_second(self) -> float:
        """Training rate over the whole run; padding does not count."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def metrics(self) -> dict[str, Any]:
        """Returns the numbers that compare members: base model (step 0), best and last evaluation, rate, memory."""
        base, *trained = self.evaluations
        return {
            "base": base,
            "best": min(trained, key=lambda evaluation: evaluation["eval_loss"]),
            "final": trained[-1],
            "tokens_per_second": self.tokens_per_second,
            "training_seconds": round(self.seconds, 1),
            "answering_seconds": round(self.answering, 1),
            "peak_memory_gb": peak_memory_gb(),
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            log.info("resuming from step %s of %s", state.global_step, state.max_steps)
        # The rate of this process: what came before an interruption may have been another machine's.
        self.started, self.first_step = time.monotonic(), state.global_step
        self.audience.on_progress(status="running", step=state.global_step, steps=state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.monotonic() - self.step_started
        self.tokens = int(state.num_input_tokens_seen)
        self.audience.on_progress(step=state.global_step, seconds_left=self.seconds_left(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.record_training(state.global_step, logs)
        elif "eval_loss" in logs:
            self.record_evaluation(state, logs)

    def record_training(self, step: int, logs: dict[str, float]) -> None:
        """Records the training loss and the rate since the last log."""
        seconds, tokens = self.seconds - self.logged[0], self.tokens - self.logged[1]
        self.logged = [self.seconds, self.tokens]
        values: dict[str, float] = {
            name: logs[name] for name in ("epoch", "loss", "grad_norm", "learning_rate") if name in logs
        }
        values |= {"tokens_per_second": tokens / seconds, "peak_memory_gb": peak_memory_gb()}
        self.audience.tracker.log(step, values)
        self.audience.on_progress(loss=logs["loss"], tokens_per_second=tokens / seconds)

    def record_evaluation(self, state: TrainerState, logs: dict[str, float]) -> None:
        """Records an evaluation on the validation set."""
        latest: dict[str, float] = {"step": state.global_step, "eval_loss": logs["eval_loss"]}
        latest |= {name: logs[f"eval_{name}"] for name in ("perplexity", "token_accuracy")}
        # An evaluation that an interruption cut short is made again.
        self.evaluations = [e for e in self.evaluations if e["step"] != state.global_step] + [latest]
        named = {name: value for name, value in logs.items() if name.startswith("eval_")}
        self.audience.tracker.log(state.global_step, named)
        if state.global_step:  # at every evaluation: an interrupted run keeps its numbers
            write_json(self.audience.metrics_file, self.metrics())
        self.audience.on_progress(eval_loss=logs["eval_loss"])
        log.info("%s", self.evaluation_line(state))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        began = time.monotonic()
        answers = self.baseline
        if state.global_step:
            size, batch = self.evaluation.max_new_tokens, self.evaluation.batch_size
            answers = answer(kwargs["model"], self.tokenizer, self.questions, size, batch)
        self.answering += time.monotonic() - began
        if state.global_step:
            write_json(self.audience.metrics_file, self.metrics())
        self.audience.tracker.log_samples(state.global_step, sample_rows(self.questions, answers))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        share = self.answering / max(self.seconds, 0.001)
        line = f"answers to {len(self.questions)} questions at every evaluation took {self.answering:.0f} s"
        line += f", {share:.0%} of the {self.seconds:.0f} s of training"
        if share > ANSWERING_SHARE:
            line += ": raise eval.every, or lower eval.max_new_tokens"
        log.info("%s", line)

    def seconds_left(self, state: TrainerState) -> float | None:
        """Returns the seconds until the last step, at the rate so far, evaluations included; None before there is a
        rate.
        """
        done = state.global_step - self.first_step
        if not done:
            return None
        return (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)

    def evaluation_line(self, state: TrainerState) -> str:
        """Returns the latest evaluation in one line."""
        latest = self.evaluations[-1]
        line = f"step {state.global_step}/{state.max_steps}  eval_loss {latest['eval_loss']:.4f}"
        line += f"  perplexity {latest['perplexity']:.2f}"
        if state.global_step == 0:
            return line + "  (base model)"
        line += f"  {self.tokens_per_second:.0f} tokens/s"
        left = self.seconds_left(state)
        return line + f"  {left / 60:.1f} min left" if left else line


def sample_rows(questions: Sequence[Question], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Returns rows of samples.jsonl, without their step. Scores are null where there is nothing to compare with.

    All answers are scored in one call: a call costs more than what it computes.
    """
    compared = [i for i, question in enumerate(questions) if question.reference]
    scores: dict[str, Any] = {}
    if compared:
        scores = lexical.scores([answers[i].text for i in compared], [questions[i].reference for i in compared])
    rows = []
    for i, (question, answered) in enumerate(zip(questions, answers, strict=True)):
        row: dict[str, Any] = {"prompt": question.prompt, "category": question.category}
        row |= {"reference": question.reference, "answer": answered.text}
        row |= {"stop": answered.stop, "tokens": answered.tokens, "rouge_l": None, "chrf": None}
        if question.reference:
            row |= {name: float(scores[name][compared.index(i)]) for name in ("rouge_l", "chrf")}
        judgement = judge(answered.text, question.prompt)
        rows.append(row | {"safe": passes(judgement, question.expected) if question.expected else None})
    return rows
