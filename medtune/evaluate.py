"""Measure adapters, or a base alone, on what training never saw.

python -m medtune.evaluate run=multirun/medtune/TIME     every member of a sweep
python -m medtune.evaluate                               the base alone
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from medtune.benchmark import require_benchmarks
from medtune.checks import typed
from medtune.command_line import command
from medtune.config import Evaluation, Refusal, Run
from medtune.quiet import quiet_libraries
from medtune.result import Failure, plain, read_json
from medtune.saved_adapter import require_whole, weights_of

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


def evaluate(evaluation: Evaluation, keys: frozenset[str], out: Path) -> list[Candidate]:
    """Measure every candidate that `evaluation.run` names and write the numbers into its folder.

    `keys`: the groups and keys that were given on the command line, and win over a run's own. `out`: for the numbers of
    a base alone. What can be refused is refused before a model is loaded: an adapter that is missing,
    damaged, of another base or vocabulary, a test set that is empty or was trained on. Raises `Refusal`.
    """
    candidates = candidates_of(evaluation, keys, out)
    require_benchmarks([task for candidate in candidates for task in candidate.run.eval.benchmarks])
    from medtune.data import prepare

    sets = [prepare(candidate.run.data) for candidate in candidates]
    refuse([problem for c, found in zip(candidates, sets, strict=True) for problem in trained_on(c, found.test)])
    # Importing these takes ten seconds: not before the folders are known to be good.
    quiet_libraries()
    from medtune import adapter, model
    from medtune.assessment import assess
    from medtune.examination import examination
    from medtune.tokens import tokenize

    loaded: tuple[Any, ...] = ()
    for place, (candidate, conversations) in enumerate(zip(candidates, sets, strict=True), 1):
        run = candidate.run
        if candidate.folder:
            log.info("%s of %s: %s", place, len(candidates), candidate.folder.name)
        device = model.device_for(run.model)
        tokenizer = model.load_tokenizer(run.model)
        if candidate.adapter:
            adapter.require_vocabulary(candidate.adapter, tokenizer, run.model.hub_id)
        tokens = tokenize(tokenizer, conversations, run.trainer.max_length)
        exam = examination(tokens, conversations, run.eval, run.data.system_prompt)
        if not loaded or loaded[0] != (run.model, run.quantization):
            model.require_memory(run.model, run.quantization, device)
            base = model.load_base(run.model, run.quantization, tokenizer, device)
            loaded = ((run.model, run.quantization), base, model.fingerprint(base))
        _, base, fingerprint = loaded
        candidate.results.mkdir(parents=True, exist_ok=True)
        if candidate.folder is None or candidate.adapter is None:
            assess(base, tokenizer, exam, run.eval, fingerprint, None, candidate.results)
            continue
        require_base(candidate.folder, fingerprint)
        tuned = adapter.load(base, candidate.adapter)
        weights = weights_of(candidate.adapter)
        assess(tuned, tokenizer, exam, run.eval, fingerprint, weights, candidate.results)
        loaded = (loaded[0], tuned.unload(), fingerprint)
    return candidates


def candidates_of(evaluation: Evaluation, keys: frozenset[str], out: Path) -> list[Candidate]:
    """Every run that `evaluation.run` names, with its own configuration. Raises `Refusal`."""
    if evaluation.run is None:
        require_test_set(evaluation)
        return [Candidate(evaluation, None, out)]
    named = [evaluation.run] if isinstance(evaluation.run, str) else evaluation.run
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise Refusal(f"run={evaluation.run}: name a result folder, or several, as run=[one,another]")
    candidates: list[Candidate] = []
    problems: list[str] = []
    for folder in [folder for name in named for folder in members_of(name)]:
        try:
            candidates.append(candidate_of(folder, evaluation, keys))
        except Refusal as refusal:
            problems += refusal.lines
    refuse(problems)
    return candidates


def members_of(name: str) -> list[Path]:
    """The run that a folder holds, or the runs of its sweep. Raises `Refusal` if it holds none."""
    folder = Path(name).expanduser()
    if (folder / "run.json").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/run.json"))
    if not found:
        holds = "no run in it" if folder.is_dir() else "no such folder"
        raise Refusal(f"run={name}: {holds}: name a result folder, as multirun/medtune/TIME or one of its members")
    return found


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
    return Candidate(run, folder, folder / "evaluation" / run.data.name if run.data != trained.data else folder)


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
        f"trained on ({first} is the first): measure it on other data"
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
    try:
        candidates = evaluate(typed(cfg, Evaluation), keys, Path(hydra.runtime.output_dir))
    except Refusal:
        raise
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        log.error("%s", line, exc_info=error, extra={"file_only": True})
        raise Failure(f"{line} (traceback in {Path(hydra.runtime.output_dir) / 'evaluate.log'})") from error
    from medtune.comparison import Member, everything

    print(everything([Member(found.folder or found.results, found.results) for found in candidates]), flush=True)


def main() -> None:
    """Entry point of `python -m medtune.evaluate` and `medtune-evaluate`."""
    command(run_evaluation, "evaluate", Evaluation)


if __name__ == "__main__":
    main()
