"""Measure adapters, or a base alone, on what training never saw.

python -m medtune.evaluate run=multirun/medtune/TIME     every member of a sweep
python -m medtune.evaluate                               the base alone
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from medtune.benchmark import load_tasks
from medtune.checks import typed
from medtune.command_line import command
from medtune.config import Evaluation, Refusal, Run
from medtune.logs import FILE_ONLY
from medtune.quiet import quiet_libraries
from medtune.result import Failure, plain, read_json, shown
from medtune.saved_adapter import require_whole

log = logging.getLogger(__name__)


@dataclass
class Candidate:
    """What is measured: a run's adapter, or a base alone, where `folder` is None; `results` is where its numbers go."""

    run: Run
    folder: Path | None
    results: Path

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter."""
        return self.folder / "adapter" if self.folder else None


def evaluate(evaluation: Evaluation, keys: frozenset[str], out: Path) -> tuple[list[Candidate], list[str]]:
    """Measure every candidate that `evaluation.run` names and write the numbers into its folder.

    `keys`: the groups and keys that were given on the command line, and win over a run's own. `out`: for the numbers of
    a base alone. Returns the candidates that were measured, and a line for each that failed. What can be refused is
    refused before any model is loaded: an adapter that is missing, damaged, of another base or vocabulary, a test set
    that is empty or was trained on. Raises `Refusal`.
    """
    candidates = candidates_of(evaluation, keys, out)
    if tasks := list(dict.fromkeys(task for candidate in candidates for task in candidate.run.eval.benchmarks)):
        load_tasks(tasks)  # their data: not after hours of measuring
    from medtune.data import prepare

    sets = [prepare(candidate.run.data) for candidate in candidates]
    refuse([problem for c, found in zip(candidates, sets, strict=True) for problem in trained_on(c, found.test)])
    for candidate, found in zip(candidates, sets, strict=True):
        before = read_json(candidate.results / "run.json").get("data_fingerprint", found.fingerprint)
        if before != found.fingerprint:
            log.warning("%s: its data has changed since it was trained, and so may its test set", candidate.folder)
    # Importing these takes ten seconds: not before the folders are known to be good.
    quiet_libraries()
    from medtune import adapter, model

    tokenizers = [model.load_tokenizer(candidate.run.model) for candidate in candidates]
    for candidate, tokenizer in zip(candidates, tokenizers, strict=True):
        if candidate.adapter:
            adapter.require_vocabulary(candidate.adapter, tokenizer, candidate.run.model.hub_id)
    measured: list[Candidate] = []
    failures: list[str] = []
    base = Base()
    for place, candidate in enumerate(candidates):
        log.info("%s of %s: %s", place + 1, len(candidates), shown(candidate.folder or candidate.results))
        try:
            base.load(candidate.run, tokenizers[place])
            measure(candidate, base, tokenizers[place], sets[place])
            measured.append(candidate)
        except Exception as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            failures.append(line if isinstance(error, Refusal) else f"{candidate.folder or 'the base'}: {line}")
            log.error("%s", failures[-1], exc_info=error, extra=FILE_ONLY)
            base = Base()  # what is left of the adapter goes with it
    return measured, failures


class Base:
    """The base in memory, shared by the candidates that need the same."""

    model: Any = None

    def __init__(self) -> None:
        self.made_of: Any = None

    def load(self, run: Run, tokenizer: Any) -> None:
        """Load the base of a run, unless it is there already."""
        from medtune import frozen, model

        if self.made_of == (run.model, run.quantization):
            return
        device = model.device_for(run.model)
        self.made_of = self.model = None  # before the memory is asked for
        model.require_memory(run.model, run.quantization, device)
        self.model = model.load_base(run.model, run.quantization, tokenizer, device)
        self.fingerprint = frozen.fingerprint(self.model)
        self.made_of = (run.model, run.quantization)


def measure(candidate: Candidate, base: Base, tokenizer: Any, conversations: Any) -> None:
    """Measure one candidate; the base is as before afterwards."""
    from medtune import adapter
    from medtune.assessment import assess
    from medtune.examination import examination
    from medtune.tokens import tokenize

    run, results = candidate.run, candidate.results
    tokens = tokenize(tokenizer, conversations, run.trainer.max_length)
    exam = examination(tokens, conversations, run.eval, run.data.system_prompt)
    results.mkdir(parents=True, exist_ok=True)
    if candidate.folder is None or candidate.adapter is None:
        assess(base.model, tokenizer, exam, run.eval, base.fingerprint, None, results, results)
        return
    require_base(candidate.folder, base.fingerprint)
    tuned = adapter.load(base.model, candidate.adapter)
    stores = candidate.folder / ".evaluation"
    assess(tuned, tokenizer, exam, run.eval, base.fingerprint, candidate.adapter, results, stores)
    base.model = tuned.unload()


def candidates_of(evaluation: Evaluation, keys: frozenset[str], out: Path) -> list[Candidate]:
    """Every run that `evaluation.run` names, with its own configuration. Raises `Refusal`."""
    if evaluation.run is None:
        require_test_set(evaluation)
        return [Candidate(evaluation, None, out)]
    if own := sorted(key for key in keys if key.partition(".")[0] not in ("run", "data", "model", "eval", "hydra")):
        raise Refusal(
            *(f"{key} belongs to training: with run=… only data, model and eval can be changed" for key in own)
        )
    named = [evaluation.run] if isinstance(evaluation.run, str) else evaluation.run
    if not isinstance(named, list) or not all(isinstance(name, str) and name for name in named) or not named:
        raise Refusal(f"run={evaluation.run}: name a result folder, or several, as run=[one,another]")
    candidates: list[Candidate] = []
    problems: list[str] = []
    for folder in dict.fromkeys(folder for name in named for folder in members_of(name)):
        try:
            candidates.append(candidate_of(folder, evaluation, keys))
        except Refusal as refusal:
            problems += refusal.lines
    refuse(problems)
    return candidates


def members_of(name: str) -> list[Path]:
    """The run that a folder holds, or the finished runs of its sweep. Raises `Refusal` if there is none."""
    folder = Path(name).expanduser()
    if (folder / "run.json").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/run.json"))
    if not found:
        holds = "no run in it" if folder.is_dir() else "no such folder"
        if (folder.parent / "run.json").is_file():
            holds += f" (did you mean run={folder.parent}?)"
        raise Refusal(f"run={name}: {holds}: name a result folder, as multirun/medtune/TIME or one of its members")
    finished = [path for path in found if (path / "adapter").is_dir()]
    for path in found:
        if finished and path not in finished:
            log.warning("%s is left out: it has no adapter (%s)", path, read_json(path / "run.json").get("status"))
    return finished or found


def candidate_of(folder: Path, evaluation: Evaluation, keys: frozenset[str]) -> Candidate:
    """A run as its run.json has it, with what was typed now. Raises `Refusal` if it cannot be measured."""
    facts = read_json(folder / "run.json")
    if "configuration" not in facts:
        raise Refusal(f"{folder}: its run.json has no configuration: it was made by an older medtune, or is damaged")
    if facts["status"] != "done" and not (folder / "adapter").is_dir():
        raise Refusal(f"{folder}: no adapter: the run is {facts['status']} ({facts.get('error') or 'not finished'})")
    own = OmegaConf.create(facts["configuration"])
    now = OmegaConf.create(plain(evaluation))
    trained = typed(own, Run)
    for key in sorted(keys):  # a group before its keys
        if key.partition(".")[0] in ("data", "model", "eval"):
            OmegaConf.update(own, key, OmegaConf.select(now, key), merge=False, force_add=True)
    run = typed(own, Run)
    require_test_set(run)
    require_whole(folder / "adapter", run.model.hub_id)
    # Weights may lie elsewhere today; anything else that differs gives other numbers, which belong in another folder.
    model = replace(run.model, weights=trained.model.weights, path=trained.model.path)
    if (run.data, run.eval, model) == (trained.data, trained.eval, trained.model):
        return Candidate(run, folder, folder)
    differing = repr((run.data, run.eval, model)).encode()
    name = f"{run.data.name}-{hashlib.sha256(differing).hexdigest()[:8]}"
    return Candidate(run, folder, folder / "evaluation" / name)


def keys_typed(words: Sequence[str]) -> frozenset[str]:
    """The keys that overrides set; a group within a group, as data/preparation, counts as the outer one."""
    names = (word.lstrip("+~").partition("=")[0].partition("@")[0] for word in words)
    return frozenset(name.partition("/")[0] for name in names)


def require_test_set(run: Run) -> None:
    """Raises `Refusal` for a configuration that keeps no test set."""
    if run.data.test_size == 0:
        raise Refusal("data.test_size=0: there is no test set to measure on; a run trained so has seen all of its data")


def trained_on(candidate: Candidate, test: Sequence[Any]) -> list[str]:
    """A line if conversations of the test set were trained on."""
    from medtune.data.questions import question_key, read_questions

    if not len(test):
        return [f"{candidate.run.data.name}: its test set is empty: raise data.test_size"]
    if candidate.folder is None:
        return []
    seen = read_questions(candidate.folder / "trained_on.parquet")
    overlap = [found for found in test if question_key(found.messages) in seen]
    if not overlap:
        return []
    first = f"{overlap[0].source} row {overlap[0].row}"
    return [
        f"{candidate.folder}: {len(overlap)} of the {len(test)} test questions of {candidate.run.data.name} were "
        f"trained or selected on ({first} is the first): measure it on other data"
    ]


def require_base(folder: Path, fingerprint: str) -> None:
    """Raises `Refusal` when the base is not to the bit the one that the adapter was trained on."""
    trained = read_json(folder / "run.json").get("base", {}).get("fingerprint")
    if trained is not None and trained != fingerprint:
        raise Refusal(
            f"{folder}: the adapter was trained on other weights (sha256 {trained[:12]}) than these (sha256 "
            f"{fingerprint[:12]}): another revision, or quantized elsewhere"
        )


def refuse(problems: Sequence[str]) -> None:
    """Raises `Refusal` if there is a problem."""
    if problems:
        raise Refusal(*problems)


def run_evaluation(cfg: DictConfig) -> None:
    """Hydra's task."""
    hydra = HydraConfig.get()
    keys = keys_typed(hydra.overrides.task)
    measured, failures = evaluate(typed(cfg, Evaluation), keys, Path(hydra.runtime.output_dir))
    if measured:
        from medtune.comparison import Member, everything

        print(everything([Member(found.folder or found.results, found.results) for found in measured]), flush=True)
    if failures:
        raise Failure("\n".join([*failures, f"tracebacks in {Path(hydra.runtime.output_dir) / 'evaluate.log'}"]))


def main() -> None:
    """Entry point of `python -m medtune.evaluate` and `medtune-evaluate`."""
    command(run_evaluation, "evaluate", Evaluation)


if __name__ == "__main__":
    main()
