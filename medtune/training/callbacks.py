"""What comes of an optimizer step: its tokens are counted, and nothing follows it if a number is not finite."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from medtune.config.schema import Eval
from medtune.evaluation.answers import Answer, Question, answer
from medtune.evaluation.metrics import lexical
from medtune.evaluation.safety.rubric import judge, passes
from medtune.modeling.memory import peak_memory_gb
from medtune.results.tracking import Tracker
from medtune.runtime.files import write_json

if TYPE_CHECKING:
    from medtune.modeling.multi_lora.handle import BaseHandle

log = logging.getLogger(__name__)


class Diverged(Exception):
    """The loss or a gradient is no longer a number; nothing after this step may be kept."""


class HasHandle(Protocol):
    handle: "BaseHandle | None"


class StepGuard(TrainerCallback):
    """Looks at every step of a trainer.

    A GPU is asked, and waited for, once, when all work of the step is on its way to it. (bitsandbytes' optimizers wait
    for it all the same, at each tensor, and fp16's scaler once.)

    `losses`, `tokens`: of each micro-batch of the step. `answer`: the step's tokens, whether its losses are finite, and
    whether its gradients are.
    """

    answer: torch.Tensor

    def __init__(self, trainer: "HasHandle") -> None:
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer: asks, while there are gradients, what `on_step_end` reads."""
        losses, tokens = torch.stack(self.losses), torch.stack(self.tokens).sum()
        self.losses, self.tokens = [], []
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        # With fp16 the gradient scaler meets infinities by design, and skips their step.
        norms = torch.zeros(1, device=losses.device) if args.fp16 else torch.stack(torch._foreach_norm(gradients))
        self.answer = torch.stack([tokens, torch.isfinite(losses).all(), torch.isfinite(norms).all()])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer. Raises `Diverged`: the weights are spoiled, and are neither saved nor measured."""
        if self.trainer.handle:
            self.trainer.handle.yield_turn()
        tokens, loss_is_finite, gradient_is_finite = self.answer.tolist()
        state.num_input_tokens_seen += tokens
        if not (loss_is_finite and gradient_is_finite):
            what = "a gradient is not finite" if loss_is_finite else "the loss is not finite"
            raise Diverged(f"{what} at step {state.global_step}: lower the learning rate")


DEAR = 0.2  # share of the training time that answers may take before the run says how to make them cheaper


def scored(question: Question, answer: Answer) -> dict[str, Any]:
    """A row of samples.jsonl. Scores are null where there is nothing to compare with."""
    row: dict[str, Any] = {"prompt": question.prompt, "category": question.category, "reference": question.reference}
    row |= {"answer": answer.text, "stop": answer.stop, "tokens": answer.tokens, "rouge_l": None, "chrf": None}
    if question.reference:
        found = lexical.scores([answer.text], [question.reference])
        row |= {name: float(found[name][0]) for name in ("rouge_l", "chrf")}
    judgement = judge(answer.text, question.prompt)
    return row | {"safe": passes(judgement, question.expected) if question.expected else None}


class MetricsCallback(TrainerCallback, ExportableState):
    """Record numbers at every log and answers at every evaluation, and tell whoever watches.

    `baseline`: what the base answers, the answers at step 0. `on_progress`: called with what a
    `MemberProgress` holds. Its own counts are kept in checkpoints.
    """

    def __init__(
        self,
        tracker: Tracker,
        tokenizer: PreTrainedTokenizerBase,
        asked: Sequence[Question],
        baseline: Sequence[Answer],
        evaluation: Eval,
        metrics_file: Path,
        on_progress: Callable[..., None],
    ) -> None:
        self.tracker, self.tokenizer, self.asked, self.baseline = tracker, tokenizer, asked, baseline
        self.evaluation, self.metrics_file, self.on_progress = evaluation, metrics_file, on_progress
        # step, eval_loss, perplexity, token_accuracy of each evaluation; step 0 is the untuned base
        self.evaluations: list[dict[str, float]] = []
        self.seconds = 0.0  # in training steps alone, evaluations left out
        self.answering = 0.0  # seconds
        self.tokens = 0
        self.logged = [0.0, 0]  # seconds and tokens at the last log
        self.started, self.first_step, self.step_started = time.monotonic(), 0, 0.0

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        kept = ("evaluations", "seconds", "answering", "tokens", "logged")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in kept}}

    @property
    def tokens_per_second(self) -> float:
        """Training rate over the whole run; padding does not count."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def metrics(self) -> dict[str, Any]:
        """The numbers a member is compared by: the base (step 0), its best and its last evaluation, rate and memory."""
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
            log.info("going on from step %s of %s", state.global_step, state.max_steps)
        # The rate of this process: what came before an interruption may have been another machine's.
        self.started, self.first_step = time.monotonic(), state.global_step
        self.on_progress(status="running", step=state.global_step, steps=state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.monotonic() - self.step_started
        self.tokens = int(state.num_input_tokens_seen)
        self.on_progress(step=state.global_step, seconds_left=self.seconds_left(state))

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
            seconds, tokens = self.seconds - self.logged[0], self.tokens - self.logged[1]
            self.logged = [self.seconds, self.tokens]
            values: dict[str, float] = {
                name: logs[name] for name in ("epoch", "loss", "grad_norm", "learning_rate") if name in logs
            }
            values |= {"tokens_per_second": tokens / seconds, "peak_memory_gb": peak_memory_gb()}
            self.tracker.log(state.global_step, values)
            self.on_progress(loss=logs["loss"], tokens_per_second=tokens / seconds)
        elif "eval_loss" in logs:
            latest = {name: logs[f"eval_{name}"] for name in ("perplexity", "token_accuracy")}
            latest = {"step": state.global_step, "eval_loss": logs["eval_loss"], **latest}
            # One that was cut short by an interruption is made again.
            self.evaluations = [e for e in self.evaluations if e["step"] != state.global_step] + [latest]
            self.tracker.log(state.global_step, {n: v for n, v in logs.items() if n.startswith("eval_")})
            if state.global_step:  # at every evaluation: an interrupted run keeps its numbers
                write_json(self.metrics_file, self.metrics())
            self.on_progress(eval_loss=logs["eval_loss"])
            self.say(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        began = time.monotonic()
        size, batch = self.evaluation.max_new_tokens, self.evaluation.batch_size
        trained = state.global_step > 0
        answers = answer(kwargs["model"], self.tokenizer, self.asked, size, batch) if trained else self.baseline
        self.answering += time.monotonic() - began
        if trained:
            write_json(self.metrics_file, self.metrics())
        self.tracker.log_samples(state.global_step, [scored(q, a) for q, a in zip(self.asked, answers, strict=True)])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        share = self.answering / max(self.seconds, 0.001)
        line = f"answers to {len(self.asked)} questions at every evaluation took {self.answering:.0f} s"
        line += f", {share:.0%} of the {self.seconds:.0f} s of training"
        log.info(line + (": raise eval.every, or lower eval.max_new_tokens" if share > DEAR else ""))

    def seconds_left(self, state: TrainerState) -> float | None:
        """Until the last step, at the rate so far, evaluations included; None before there is a rate."""
        done = state.global_step - self.first_step
        return (time.monotonic() - self.started) / done * (state.max_steps - state.global_step) if done else None

    def say(self, state: TrainerState) -> None:
        """One line for the latest evaluation."""
        latest = self.evaluations[-1]
        line = f"step {state.global_step}/{state.max_steps}  eval_loss {latest['eval_loss']:.4f}"
        line += f"  perplexity {latest['perplexity']:.2f}"
        if state.global_step == 0:
            line += "  (the untuned base)"
        else:
            line += f"  {self.tokens_per_second:.0f} tokens/s"
            if left := self.seconds_left(state):
                line += f"  {left / 60:.1f} min left"
        log.info(line)
