"""How fast a model is evaluated, beside the plain way: `trainer.evaluate()`, and `generate` one by one.

Command: make bench

The embedded model in NF4 with an adapter, the bundled conversations. Both ways take turns in one process, so that what
else the machine does hits both; what is printed are ratios of the medians, and whether the numbers are the same.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import hydra
import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from medtune.config.groups import CONF, register
from medtune.config.schema import RunConfig
from medtune.config.validation import build_config
from medtune.data.prepared import prepare
from medtune.data.tokenization.chat_template import encode
from medtune.data.tokenization.dataset import tokenize
from medtune.evaluation.answers import answer, last_turn_questions, read_answer
from medtune.evaluation.likelihood import likelihood
from medtune.modeling import base as model
from medtune.modeling.lora import adapter
from medtune.modeling.tokenizer import load_tokenizer
from medtune.runtime.logs import silence_libraries

ROUNDS = 3
ROWS = 48
QUESTIONS = 16
NEW_TOKENS = 48
PLAIN_BATCH = 8  # TRL's default


def main() -> None:
    """Time both ways in turn."""
    silence_libraries()
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        run = build_config(hydra.compose("train"), RunConfig)
    tokenizer = load_tokenizer(run.model)
    tuned, theirs = (with_adapter(run, tokenizer) for _ in range(2))
    for module in theirs.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = (
                True  # as bitsandbytes has it: faster for one row, but no training after
            )
    conversations = prepare(run.data)
    tokens = tokenize(tokenizer, conversations, run.trainer.max_length)
    rows = tokens.train.select(range(ROWS)).select_columns(["input_ids", "labels"])
    asked = last_turn_questions([row.messages for row in conversations.train[:QUESTIONS]])
    print(
        f"{ROWS} rows of {np.mean([len(r['input_ids']) for r in rows]):.0f} tokens; {QUESTIONS} answers of {NEW_TOKENS}"
    )
    trainer = plain_trainer(theirs, tokenizer, rows)
    plain, ours = in_turn(
        lambda: trainer.evaluate()["eval_loss"],
        lambda: likelihood(tuned, rows["input_ids"][:], rows["labels"][:], run.eval.batch_size),
    )
    same = regrouped(ours.result.nll, ours.result.tokens)
    print(
        f"loss: plain {plain.seconds:.1f} s, medtune {ours.seconds:.1f} s: {plain.seconds / ours.seconds:.1f} times as "
        f"fast; {plain.result:.4f} and {same:.4f} averaged by batches as plain does, {ours.result.loss:.4f} by token"
    )
    plain, ours = in_turn(
        lambda: [plain_answer(theirs, tokenizer, question) for question in asked],
        lambda: answer(tuned, tokenizer, asked, NEW_TOKENS, run.eval.batch_size),
    )
    same = sum(a.text == b.text for a, b in zip(plain.result, ours.result, strict=True))
    print(
        f"answers: plain {plain.seconds:.1f} s, medtune {ours.seconds:.1f} s: {plain.seconds / ours.seconds:.1f} times "
        f"as fast; {same} of {len(asked)} the same to the letter: bfloat16 rounds otherwise in a batch"
    )


def with_adapter(run: RunConfig, tokenizer: Any) -> Any:
    """The embedded model with an adapter that does something."""
    base = model.load_base(run.model, run.quantization, tokenizer, torch.device("cpu"))
    tuned = adapter.add_lora(base, run.lora, run.seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return tuned


class Timed:
    """The last result of a function, and the median of the seconds that it took."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function, self.times = function, list[float]()

    def once(self) -> None:
        began = time.monotonic()
        self.result = self.function()
        self.times.append(time.monotonic() - began)

    @property
    def seconds(self) -> float:
        return median(self.times)


def in_turn(*functions: Callable[[], Any]) -> list[Timed]:
    """Call the functions in turn, ROUNDS times each."""
    timed = [Timed(function) for function in functions]
    for _ in range(ROUNDS):
        for each in timed:
            each.once()
    return timed


def plain_trainer(tuned: Any, tokenizer: Any, rows: Dataset) -> SFTTrainer:
    """TRL's trainer at its defaults."""
    arguments = SFTConfig(output_dir="unused", report_to="none", use_cpu=True, disable_tqdm=True, max_length=None)
    trainer = SFTTrainer(model=tuned, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    adapter.to_float32(tuned)  # TRL casts it to bfloat16
    return trainer


def plain_answer(tuned: Any, tokenizer: Any, question: Any) -> Any:
    """`generate` for one question."""
    ids = encode(tokenizer, question.messages, add_generation_prompt=True).input_ids
    with torch.no_grad():
        said = tuned.eval().generate(
            input_ids=torch.tensor([ids]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    return read_answer(tokenizer, said[0, len(ids) :].tolist(), set(tuned.generation_config.eos_token_id))


def regrouped(nll: np.ndarray, tokens: np.ndarray) -> float:
    """The mean of batch means over batches in the set's order, as `Trainer.evaluate` takes it."""
    starts = range(0, len(nll), PLAIN_BATCH)
    sizes = [len(nll[start : start + PLAIN_BATCH]) for start in starts]
    means = [nll[s : s + PLAIN_BATCH].sum() / tokens[s : s + PLAIN_BATCH].sum() for s in starts]
    return float(np.average(means, weights=sizes))


if __name__ == "__main__":
    main()
