"""Successive halving (arXiv:1502.07943): members that fall behind stop early, and their time goes to the others."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medtune.config.serialize import config_diff, to_plain
from medtune.runtime.errors import UserError
from medtune.runtime.files import read_json, read_jsonl, write_json
from medtune.runtime.status import FINISHED
from medtune.sweep.ledger import Ledger, Member

log = logging.getLogger(__name__)


@dataclass
class Rung:
    """An evaluation at which members are judged: its number, and the optimizer step after which it comes."""

    evaluation: int
    step: int

    def reached(self, member: Member) -> bool:
        """Returns whether a member has been evaluated there."""
        return self.loss(member) is not None

    def loss(self, member: Member) -> float | None:
        """Returns a member's eval_loss there, in nats per target token."""
        rows = read_jsonl(member.folder / "history.jsonl")
        return next((row["eval_loss"] for row in rows if row["step"] == self.step and "eval_loss" in row), None)


class Halving:
    """Judges members at evaluations 1, k, k², … and keeps the best one in k of those still running.

    Who is kept depends on the losses alone, not on the order or the speed in which members ran.
    """

    def __init__(self, ledger: Ledger, members: Sequence[Member], keep_one_in: int) -> None:
        """Raises `UserError` when members' losses cannot be compared: other data, or evaluations at other steps."""
        self.ledger, self.members, self.keep_one_in = ledger, members, keep_one_in
        first, *others = members
        for other in others:
            if changed := config_diff(judged_by(first), judged_by(other)):
                raise UserError(
                    f"hydra.launcher.prune compares members at the same evaluations of the same data, and {first.name} "
                    f"and {other.name} differ in {', '.join(changed)}: leave prune out"
                )

    @property
    def rungs(self) -> list[Rung]:
        """The evaluations at which members are judged, until one would be left."""
        every, left, evaluation, found = self.members[0].run.eval.every, len(self.members), 1, []
        while left > 1:
            found.append(Rung(evaluation, every * evaluation))
            left, evaluation = math.ceil(left / self.keep_one_in), evaluation * self.keep_one_in
        return found

    def judge(self, rung: Rung) -> list[Member]:
        """Stops members that fall behind at a rung and returns them. A decision in the ledger stands."""
        running = {m.key for m in self.members if m.status not in FINISHED and rung.reached(m)}
        stands = [d for d in self.ledger.rungs if d["step"] == rung.step and running <= {*d["kept"], *d["pruned"]}]
        decision = stands[-1] if stands else self.decide(rung)
        pruned = [m for m in self.members if m.key in decision["pruned"] and m.status not in FINISHED]
        for member in pruned:
            facts = read_json(member.folder / "run.json")
            why = f"fell behind at step {rung.step}: successive halving kept others"
            write_json(member.folder / "run.json", facts | {"status": "pruned", "error": why})
            self.ledger.update(member)
            log.info("%s is pruned at step %s, eval_loss %.4f", member.name, rung.step, rung.loss(member) or math.nan)
        return pruned

    def decide(self, rung: Rung) -> dict[str, Any]:
        """Ranks members that still run, and records which are kept."""
        running = [m for m in self.members if m.status not in FINISHED and rung.reached(m)]
        if len(running) < 2:
            return {"kept": [], "pruned": []}
        ranked = sorted(running, key=lambda member: (rung.loss(member), member.name))
        kept = ranked[: math.ceil(len(ranked) / self.keep_one_in)]
        decision = {
            "evaluation": rung.evaluation,
            "step": rung.step,
            "eval_loss": {member.name: rung.loss(member) for member in ranked},
            "kept": [member.key for member in kept],
            "pruned": [member.key for member in ranked[len(kept) :]],
        }
        self.ledger.rungs.append(decision)
        self.ledger.write()
        return decision


def judged_by(member: Member) -> dict[str, Any]:
    """Returns what a member's eval_loss depends on beside its training."""
    parts = {name: to_plain(getattr(member.run, name)) for name in ("data", "model", "eval")}
    return parts | {"trainer": {"max_length": member.run.trainer.max_length}}
