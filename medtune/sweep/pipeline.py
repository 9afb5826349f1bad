"""Members -> adapters: grouped by the inputs they share, then trained in turn, together, or on several cores."""

import gc
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from medtune.config.schema import RunConfig
from medtune.config.serialize import config_hash, to_plain
from medtune.results.run_folder import RunFolder
from medtune.runtime import interruption
from medtune.runtime.errors import UserError
from medtune.runtime.logs import log_member
from medtune.runtime.progress import Progress
from medtune.runtime.status import FINISHED
from medtune.sweep.halving import Halving
from medtune.sweep.ledger import Ledger, Member
from medtune.sweep.members import isolate_failures, run_member, run_members
from medtune.training.pipeline import prepare_inputs

if TYPE_CHECKING:
    from medtune.sweep.capacity import Concurrency
    from medtune.sweep.lockstep import LockstepHandle
    from medtune.training.shared_inputs import SharedInputs

log = logging.getLogger(__name__)


@dataclass
class Settings:
    """How members run. None for a number means: as many as pay.

    `width`: members in one pass through the base model. `processes`: members on cores of their own, one thread each.
    `prune`: successive halving keeps one in so many at every rung; None keeps all.
    """

    width: int | None
    processes: int | None
    prune: int | None

    def __post_init__(self) -> None:
        problems = []
        for name, least in (("width", 1), ("processes", 1), ("prune", 2)):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_whole and value >= least):
                problems.append(f"hydra.launcher.{name} must be a whole number of at least {least}, not {value!r}")
        if problems:
            raise UserError(*problems)


def run_sweep(members: Sequence[Member], ledger: Ledger, settings: Settings) -> None:
    """Runs what is left of every member and keeps the ledger. One member's failure never stops the others.

    Raises `UserError` when the settings do not fit the members, and KeyboardInterrupt when the user stops it. Members
    are saved then, and the ledger says so.
    """
    halving = Halving(ledger, members, settings.prune) if settings.prune else None
    for member in members:
        if member.status in FINISHED:
            log.info("%s is %s already", member.name, member.status)
    inputs_cache, failed = InputsCache(), set[str]()
    with Progress([member.name for member in members]) as progress:
        for member in members:
            progress.update(member.name, status=member.status, eval_loss=member.eval_loss)
        for rung in [*(halving.rungs if halving else []), None]:
            # All members reach a rung before any is judged there.
            left = [m for m in members if m.status not in FINISHED and m.name not in failed]
            for group in grouped([m for m in left if rung is None or not rung.reached(m)]):
                MemberGroup(group, ledger, settings, progress, rung.step if rung else None).run(inputs_cache)
                failed |= {m.name for m in group if m.status not in (*FINISHED, "paused")}
            if halving and rung:
                for member in halving.judge(rung):
                    progress.update(member.name, status="pruned")


def grouped(members: Sequence[Member]) -> list[list[Member]]:
    """Returns members in groups that share their inputs."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(sharing_key(member.run), []).append(member)
    return list(groups.values())


def sharing_key(run: RunConfig) -> str:
    """Returns a key that is equal for runs that can share their inputs."""
    parts = [to_plain(run.data), to_plain(run.model), to_plain(run.quantization), run.trainer.max_length]
    return config_hash({"shared": parts})


class InputsCache:
    """Keeps the inputs that were used last: the next group of members, or the next rung, may need them again."""

    def __init__(self) -> None:
        self.key = ""
        self.latest: SharedInputs | None = None

    def of(self, run: RunConfig) -> "SharedInputs":
        """Returns the inputs of a run. Raises what `prepare_inputs` raises."""
        if self.latest is None or self.key != sharing_key(run):
            self.latest = None  # frees its memory before the next is loaded
            gc.collect()
            self.latest, self.key = prepare_inputs(run), sharing_key(run)
        return self.latest


class MemberGroup:
    """Runs the members of one group, up to `pause_at` optimizer steps or to the end."""

    def __init__(
        self, members: Sequence[Member], ledger: Ledger, settings: Settings, progress: Progress, pause_at: int | None
    ) -> None:
        self.members = {member.name: member for member in members}
        self.queue = deque(self.members)
        self.ledger, self.settings, self.progress, self.pause_at = ledger, settings, progress, pause_at

    def run(self, inputs_cache: "InputsCache") -> None:
        """Runs all members on their inputs. Without inputs, all of them are refused."""
        runs = [member.run for member in self.members.values()]
        try:
            self.ledger.require_same_data(runs[0].data)
            inputs = inputs_cache.of(runs[0])
            from medtune.sweep.capacity import choose_concurrency  # heavy, and noisy before libraries are silenced

            size = choose_concurrency(runs, inputs, self.settings.width, self.settings.processes)
            for run in runs:  # once for all members, on all cores
                inputs.baseline(run)
        except Exception as error:
            for name in self.members:
                self.refuse(name, error)
            return
        with interruption.deferred():
            self.run_on(inputs, size)
            interruption.raise_if_requested()

    def run_on(self, inputs: "SharedInputs", size: "Concurrency") -> None:
        """Runs all members, as many at a time as the machine holds."""
        from medtune.modeling.attention import train_attention
        from medtune.sweep.lockstep import LockstepGroup
        from medtune.sweep.workers import Workers

        if size.processes > 1:
            self.evaluate_base(inputs)
            Workers(self, size.processes).run(lambda queue: run_members(queue, inputs, self.pause_at))
        elif size.width > 1:
            log.info("%s members train together", size.width)

            def next_job() -> Callable[["LockstepHandle"], None] | None:
                member = self.next()
                return partial(run_member, member, self, inputs, self.pause_at) if member else None

            run, base = next(iter(self.members.values())).run, inputs.base
            attention = train_attention(run.model, run.trainer.max_length, base.device)
            longest = inputs.tokens.longest
            LockstepGroup(base, size.width, size.checkpointing, attention, longest).run(next_job)
        else:
            run_members(self, inputs, self.pause_at)

    def evaluate_base(self, inputs: "SharedInputs") -> None:
        """Evaluates the base model on the test set with all cores; otherwise one worker would, while others wait."""
        try:
            for member in self.members.values():
                if member.run.eval.final:
                    inputs.evaluate_base(member.run)
        except Exception as error:  # every member meets it after training, and keeps its adapter
            log.error("the evaluation of the base model on the test set failed: %s", error)

    # The MemberQueue that workers use; `Workers` puts a pipe between.

    def next(self) -> Member | None:
        """Returns the next member; None when there are no more, or the user wants to stop."""
        if interruption.stop_requested() or not self.queue:
            return None
        return self.members[self.queue.popleft()]

    def on_progress(self, name: str, **values: Any) -> None:
        """Takes the progress of a member."""
        self.progress.update(name, **values)
        if values.get("status") == "running":
            self.ledger.update(self.members[name])

    def ended(self, name: str) -> None:
        """Takes note that a member ended."""
        member = self.members[name]
        self.ledger.update(member)
        self.progress.update(name, status=member.status, seconds_left=None)

    def refuse(self, name: str, error: Exception) -> None:
        """Ends a member that could not begin."""
        member = self.members[name]
        with isolate_failures(name), log_member(name, member.folder), RunFolder(member.run, member.folder):
            raise error
        self.ended(name)
