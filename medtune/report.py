"""What happens in training -> the tracker's events and the user's screen."""

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from medtune.config import Eval
from medtune.metrics import lexical
from medtune.result import write_json
from medtune.safety.rubric import judge, passes
from medtune.samples import Answer, Question, answer
from medtune.tracking import Tracker

log = logging.getLogger(__name__)


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


class Report(TrainerCallback, ExportableState):
    """Record numbers at every log and answers at every evaluation, and tell whoever watches.

    `untuned`: what the base answers, the answers at step 0. `watch`: called with what a `progress.Standing` holds.
    Its own counts are kept in checkpoints.
    """

    def __init__(
        self,
        tracker: Tracker,
        tokenizer: PreTrainedTokenizerBase,
        asked: Sequence[Question],
        untuned: Sequence[Answer],
        evaluation: Eval,
        metrics_file: Path,
        watch: Callable[..., None],
    ) -> None:
        self.tracker, self.tokenizer, self.asked, self.untuned = tracker, tokenizer, asked, untuned
        self.evaluation, self.metrics_file, self.watch = evaluation, metrics_file, watch
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
        self.watch(status="running", step=state.global_step, steps=state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.monotonic() - self.step_started
        self.tokens = int(state.num_input_tokens_seen)
        self.watch(step=state.global_step, seconds_left=self.seconds_left(state))

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
            self.watch(loss=logs["loss"], tokens_per_second=tokens / seconds)
        elif "eval_loss" in logs:
            latest = {name: logs[f"eval_{name}"] for name in ("perplexity", "token_accuracy")}
            latest = {"step": state.global_step, "eval_loss": logs["eval_loss"], **latest}
            # One that was cut short by an interruption is made again.
            self.evaluations = [e for e in self.evaluations if e["step"] != state.global_step] + [latest]
            self.tracker.log(state.global_step, {n: v for n, v in logs.items() if n.startswith("eval_")})
            if state.global_step:  # at every evaluation: an interrupted run keeps its numbers
                write_json(self.metrics_file, self.metrics())
            self.watch(eval_loss=logs["eval_loss"])
            self.say(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        began = time.monotonic()
        size, batch = self.evaluation.max_new_tokens, self.evaluation.batch_size
        trained = state.global_step > 0
        answers = answer(kwargs["model"], self.tokenizer, self.asked, size, batch) if trained else self.untuned
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


def reset_peak_memory() -> None:
    """Start measuring anew, so that a member of a sweep does not report the peak of the one before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # only Linux has it (man 5 proc: clear_refs)
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Peak memory of this run in 10^9 bytes: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
