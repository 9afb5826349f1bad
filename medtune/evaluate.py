"""Measure adapters, or a base alone, on what training never saw.

python -m medtune.evaluate run=multirun/medtune/TIME     every member of a sweep
python -m medtune.evaluate                               the base alone
"""

import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from medtune.config.command_line import run_command
from medtune.config.schema import EvaluateConfig, RunConfig
from medtune.config.validation import build_config
from medtune.evaluation.benchmarks import load_tasks
from medtune.evaluation.candidates import Candidate, candidates_of, keys_typed, refuse, require_base, trained_on
from medtune.runtime.errors import RunFailed, UserError
from medtune.runtime.files import display_path, read_json
from medtune.runtime.logs import FILE_ONLY, silence_libraries

log = logging.getLogger(__name__)


def evaluate(evaluation: EvaluateConfig, keys: frozenset[str], out: Path) -> tuple[list[Candidate], list[str]]:
    """Measure every candidate that `evaluation.run` names and write the numbers into its folder.

    `keys`: the groups and keys that were given on the command line, and win over a run's own. `out`: for the numbers of
    a base alone. Returns the candidates that were measured, and a line for each that failed. What can be refused is
    refused before any model is loaded: an adapter that is missing, damaged, of another base or vocabulary, a test set
    that is empty or was trained on. Raises `Refusal`.
    """
    candidates = candidates_of(evaluation, keys, out)
    if tasks := list(dict.fromkeys(task for candidate in candidates for task in candidate.run.eval.benchmarks)):
        load_tasks(tasks)  # their data: not after hours of measuring
    from medtune.data.prepared import prepare

    sets = [prepare(candidate.run.data) for candidate in candidates]
    refuse([problem for c, found in zip(candidates, sets, strict=True) for problem in trained_on(c, found.test)])
    for candidate, found in zip(candidates, sets, strict=True):
        before = read_json(candidate.results / "run.json").get("data_fingerprint", found.fingerprint)
        if before != found.fingerprint:
            log.warning("%s: its data has changed since it was trained, and so may its test set", candidate.folder)
    # Importing these takes ten seconds: not before the folders are known to be good.
    silence_libraries()
    from medtune.modeling.lora import adapter
    from medtune.modeling.tokenizer import load_tokenizer

    tokenizers = [load_tokenizer(candidate.run.model) for candidate in candidates]
    for candidate, tokenizer in zip(candidates, tokenizers, strict=True):
        if candidate.adapter:
            adapter.require_vocabulary(candidate.adapter, tokenizer, candidate.run.model.hub_id)
    measured: list[Candidate] = []
    failures: list[str] = []
    base = Base()
    for place, candidate in enumerate(candidates):
        log.info("%s of %s: %s", place + 1, len(candidates), display_path(candidate.folder or candidate.results))
        try:
            base.load(candidate.run, tokenizers[place])
            measure(candidate, base, tokenizers[place], sets[place])
            measured.append(candidate)
        except Exception as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            failures.append(line if isinstance(error, UserError) else f"{candidate.folder or 'the base'}: {line}")
            log.error("%s", failures[-1], exc_info=error, extra=FILE_ONLY)
            base = Base()  # what is left of the adapter goes with it
    return measured, failures


class Base:
    """The base in memory, shared by the candidates that need the same."""

    model: Any = None

    def __init__(self) -> None:
        self.made_of: Any = None

    def load(self, run: RunConfig, tokenizer: Any) -> None:
        """Load the base of a run, unless it is there already."""
        from medtune.modeling.base import device_for, load_base
        from medtune.modeling.frozen_base import fingerprint
        from medtune.modeling.memory import require_memory

        if self.made_of == (run.model, run.quantization):
            return
        device = device_for(run.model)
        self.made_of = self.model = None  # before the memory is asked for
        require_memory(run.model, run.quantization, device)
        self.model = load_base(run.model, run.quantization, tokenizer, device)
        self.fingerprint = fingerprint(self.model)
        self.made_of = (run.model, run.quantization)


def measure(candidate: Candidate, base: Base, tokenizer: Any, conversations: Any) -> None:
    """Measure one candidate; the base is as before afterwards."""
    from medtune.data.tokenization.dataset import tokenize
    from medtune.evaluation.eval_set import build_eval_set
    from medtune.evaluation.pipeline import evaluate_adapter
    from medtune.modeling.lora import adapter

    run, results = candidate.run, candidate.results
    tokens = tokenize(tokenizer, conversations, run.trainer.max_length)
    exam = build_eval_set(tokens, conversations, run.eval, run.data.system_prompt)
    results.mkdir(parents=True, exist_ok=True)
    if candidate.folder is None or candidate.adapter is None:
        evaluate_adapter(base.model, tokenizer, exam, run.eval, base.fingerprint, None, results, results)
        return
    require_base(candidate.folder, base.fingerprint)
    tuned = adapter.load(base.model, candidate.adapter)
    stores = candidate.folder / ".evaluation"
    evaluate_adapter(tuned, tokenizer, exam, run.eval, base.fingerprint, candidate.adapter, results, stores)
    base.model = tuned.unload()


def run_evaluation(cfg: DictConfig) -> None:
    """Hydra's task."""
    hydra = HydraConfig.get()
    keys = keys_typed(hydra.overrides.task)
    measured, failures = evaluate(build_config(cfg, EvaluateConfig), keys, Path(hydra.runtime.output_dir))
    if measured:
        from medtune.results.reader import RunResult
        from medtune.results.tables import everything

        print(everything([RunResult(found.folder or found.results, found.results) for found in measured]), flush=True)
    if failures:
        raise RunFailed("\n".join([*failures, f"tracebacks in {Path(hydra.runtime.output_dir) / 'evaluate.log'}"]))


def main() -> None:
    """Entry point of `python -m medtune.evaluate` and `medtune-evaluate`."""
    run_command(run_evaluation, "evaluate", EvaluateConfig)


if __name__ == "__main__":
    main()
