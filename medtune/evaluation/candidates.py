"""Result folders -> runs that can be evaluated. Refuses early, and imports no torch."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from medtune.config.schema import EvaluateConfig, RunConfig
from medtune.config.serialize import to_plain
from medtune.config.validation import build_config
from medtune.modeling.lora.files import require_whole
from medtune.runtime.errors import UserError
from medtune.runtime.files import read_json
from medtune.runtime.pasting import override

log = logging.getLogger(__name__)


@dataclass
class Candidate:
    """What is evaluated: a run's adapter, or a base model alone, where `folder` is None.

    `results` is where its numbers go.
    """

    run: RunConfig
    folder: Path | None
    results: Path

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter."""
        return self.folder / "adapter" if self.folder else None


def candidates_of(evaluation: EvaluateConfig, keys: frozenset[str], out: Path) -> list[Candidate]:
    """Returns every run that `evaluation.run` names, with its own configuration. Raises `UserError`."""
    if evaluation.run is None:
        require_test_set(evaluation)
        return [Candidate(evaluation, None, out)]
    if own := sorted(key for key in keys if key.partition(".")[0] not in ("run", "data", "model", "eval", "hydra")):
        raise UserError(
            *(f"{key} belongs to training: with run=… only data, model and eval can be changed" for key in own)
        )
    named = [evaluation.run] if isinstance(evaluation.run, str) else evaluation.run
    if not isinstance(named, list) or not all(isinstance(name, str) and name for name in named) or not named:
        raise UserError(f"run={evaluation.run}: name a result folder, or several, as run=[one,another]")
    candidates: list[Candidate] = []
    problems: list[str] = []
    for folder in dict.fromkeys(folder for name in named for folder in members_of(name)):
        try:
            candidates.append(candidate_of(folder, evaluation, keys))
        except UserError as refusal:
            problems += refusal.lines
    refuse(problems)
    return candidates


def members_of(name: str) -> list[Path]:
    """Returns the run that a folder holds, or the finished runs of its sweep. Raises `UserError` if there is none."""
    folder = Path(name).expanduser()
    if (folder / "run.json").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/run.json"))
    if not found:
        holds = "no run in it" if folder.is_dir() else "no such folder"
        parts = name.split(",")
        if (folder.parent / "run.json").is_file():
            holds += f" (did you mean {override('run', folder.parent)}?)"
        elif len(parts) > 1 and all(Path(part).expanduser().is_dir() for part in parts):
            holds += f" (did you mean {override('run', *parts)}?)"
        raise UserError(f"run={name}: {holds}: name a result folder, as multirun/medtune/TIME or one of its members")
    finished = [path for path in found if (path / "adapter").is_dir()]
    for path in found:
        if finished and path not in finished:
            log.warning("%s is left out: it has no adapter (%s)", path, read_json(path / "run.json").get("status"))
    return finished or found


def candidate_of(folder: Path, evaluation: EvaluateConfig, keys: frozenset[str]) -> Candidate:
    """Returns a run as its run.json has it, with what was typed now. Raises `UserError` if it cannot be evaluated."""
    facts = read_json(folder / "run.json")
    if "configuration" not in facts:
        raise UserError(f"{folder}: its run.json has no configuration: it was made by an older medtune, or is damaged")
    if facts["status"] != "done" and not (folder / "adapter").is_dir():
        raise UserError(f"{folder}: no adapter: the run is {facts['status']} ({facts.get('error') or 'not finished'})")
    own = OmegaConf.create(facts["configuration"])
    now = OmegaConf.create(to_plain(evaluation))
    trained = build_config(own, RunConfig, trains=False)
    for key in sorted(keys):  # a group before its keys
        if key.partition(".")[0] in ("data", "model", "eval"):
            OmegaConf.update(own, key, OmegaConf.select(now, key), merge=False, force_add=True)
    run = build_config(own, RunConfig, trains=False)
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
    """Returns the keys that overrides set; a group within a group, as data/preparation, counts as the outer one."""
    names = (word.lstrip("+~").partition("=")[0].partition("@")[0] for word in words)
    return frozenset(name.partition("/")[0] for name in names)


def require_test_set(run: RunConfig) -> None:
    """Raises `UserError` for a configuration that keeps no test set."""
    if run.data.test_size == 0:
        raise UserError(
            "data.test_size=0: there is no test set to evaluate on; a run trained so has seen all of its data"
        )


def trained_on(candidate: Candidate, test: Sequence[Any]) -> list[str]:
    """Returns a line if conversations of the test set were trained on."""
    from medtune.data.splitting.question_hashes import question_key, read_questions

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
        f"trained or selected on ({first} is the first): evaluate it on other data"
    ]


def require_base(folder: Path, fingerprint: str) -> None:
    """Raises `UserError` when the base is not to the bit the one that the adapter was trained on."""
    trained = read_json(folder / "run.json").get("base", {}).get("fingerprint")
    if trained is not None and trained != fingerprint:
        raise UserError(
            f"{folder}: the adapter was trained on other weights (sha256 {trained[:12]}) than these (sha256 "
            f"{fingerprint[:12]}): another revision, or quantized elsewhere"
        )


def refuse(problems: Sequence[str]) -> None:
    """Raises `UserError` if there is a problem."""
    if problems:
        raise UserError(*problems)
