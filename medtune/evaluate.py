"""Evaluate adapters, or a base model alone, on what training never saw.

python -m medtune.evaluate run=multirun/medtune/TIME     every member of a sweep
python -m medtune.evaluate                               the base model alone
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
    """Evaluates every candidate that `evaluation.run` names and writes the numbers into its folder.

    `keys`: the groups and keys given on the command line, which win over a run's own. `out`: the folder for the numbers
    of a base model alone. Returns the candidates that were evaluated, and a line for each that failed. What can be
    refused is refused before any model is loaded: an adapter that is missing, damaged, or of another base model or
    vocabulary; a test set that is empty or was trained on. Raises `UserError`.
    """
    candidates = candidates_of(evaluation, keys, out)
    if tasks := list(dict.fromkeys(task for candidate in candidates for task in candidate.run.eval.benchmarks)):
        load_tasks(tasks)  # missing benchmark data would otherwise show after hours
    from medtune.data.prepared import prepare

    sets = [prepare(candidate.run.data) for candidate in candidates]
    refuse([problem for c, found in zip(candidates, sets, strict=True) for problem in trained_on(c, found.test)])
    for candidate, found in zip(candidates, sets, strict=True):
        before = read_json(candidate.results / "run.json").get("data_fingerprint", found.fingerprint)
        if before != found.fingerprint:
            log.warning("%s: its data has changed since it was trained, and so may its test set", candidate.folder)
    # These imports take ten seconds: they wait until the folders are known to be good.
    silence_libraries()
    from medtune.modeling.lora import adapter
    from medtune.modeling.tokenizer import load_tokenizer

    tokenizers = [load_tokenizer(candidate.run.model) for candidate in candidates]
    for candidate, tokenizer in zip(candidates, tokenizers, strict=True):
        if candidate.adapter:
            adapter.require_vocabulary(candidate.adapter, tokenizer, candidate.run.model.hub_id)
    evaluated: list[Candidate] = []
    failures: list[str] = []
    base = LoadedBase()
    for index, candidate in enumerate(candidates):
        log.info("%s of %s: %s", index + 1, len(candidates), display_path(candidate.folder or candidate.results))
        try:
            base.load(candidate.run, tokenizers[index])
            evaluate_candidate(candidate, base, tokenizers[index], sets[index])
            evaluated.append(candidate)
        except Exception as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            failures.append(line if isinstance(error, UserError) else f"{candidate.folder or 'the base model'}: {line}")
            log.error("%s", failures[-1], exc_info=error, extra=FILE_ONLY)
            base = LoadedBase()  # drops what is left of the adapter
    return evaluated, failures


class LoadedBase:
    """The base model in memory, shared by the candidates that need the same."""

    model: Any = None

    def __init__(self) -> None:
        self.loaded: Any = None

    def load(self, run: RunConfig, tokenizer: Any) -> None:
        """Loads the base model of a run, unless it is loaded already."""
        from medtune.modeling.base import device_for, load_base
        from medtune.modeling.frozen_base import fingerprint
        from medtune.modeling.memory import require_memory

        if self.loaded == (run.model, run.quantization):
            return
        device = device_for(run.model)
        self.loaded = self.model = None  # before the memory is asked for
        require_memory(run.model, run.quantization, device)
        self.model = load_base(run.model, run.quantization, tokenizer, device)
        self.fingerprint = fingerprint(self.model)
        self.loaded = (run.model, run.quantization)


def evaluate_candidate(candidate: Candidate, base: LoadedBase, tokenizer: Any, data: Any) -> None:
    """Evaluates one candidate. The base model is as before afterwards."""
    from medtune.data.tokenization.dataset import tokenize
    from medtune.evaluation.eval_set import build_eval_set
    from medtune.evaluation.pipeline import evaluate_adapter
    from medtune.evaluation.subject import Subject
    from medtune.modeling.lora import adapter

    run, results = candidate.run, candidate.results
    tokens = tokenize(tokenizer, data, run.trainer.max_length)
    eval_set = build_eval_set(tokens, data, run.eval, run.data.system_prompt)
    results.mkdir(parents=True, exist_ok=True)
    if candidate.folder is None or candidate.adapter is None:
        subject = Subject(base.model, tokenizer, base.fingerprint)
        evaluate_adapter(subject, eval_set, run.eval, results, results)
        return
    require_base(candidate.folder, base.fingerprint)
    model = adapter.load(base.model, candidate.adapter)
    subject = Subject(model, tokenizer, base.fingerprint, candidate.adapter)
    evaluate_adapter(subject, eval_set, run.eval, results, candidate.folder / ".evaluation")
    base.model = model.unload()


def run_evaluation(cfg: DictConfig) -> None:
    """Hydra's task."""
    hydra = HydraConfig.get()
    keys = keys_typed(hydra.overrides.task)
    evaluation = build_config(cfg, EvaluateConfig, trains=False)
    evaluated, failures = evaluate(evaluation, keys, Path(hydra.runtime.output_dir))
    if evaluated:
        from medtune.results.reader import RunResult
        from medtune.results.tables import everything

        print(everything([RunResult(found.folder or found.results, found.results) for found in evaluated]), flush=True)
    if failures:
        raise RunFailed("\n".join([*failures, f"tracebacks in {Path(hydra.runtime.output_dir) / 'evaluate.log'}"]))


def main() -> None:
    """Entry point of `python -m medtune.evaluate` and `medtune-evaluate`."""
    run_command(run_evaluation, "evaluate", EvaluateConfig)


if __name__ == "__main__":
    main()
