"""Members -> adapters: grouped by the base they share, trained one after another, together, or on several cores."""

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
    """How members are run. None: as many as pay.

    `width`: trained together in one pass through the base; `processes`: on as many cores, one thread each;
    `prune`: successive halving keeps one in so many at every rung, None keeps all.
    """

    width: int | None
    processes: int | None
    prune: int | None

    def __post_init__(self) -> None:
        problems = [
            f"hydra.launcher.{name} must be a whole number of at least {least}, not {value!r}"
            for name, least in (("width", 1), ("processes", 1), ("prune", 2))
            if (value := getattr(self, name)) is not None
            and (not isinstance(value, int) or isinstance(value, bool) or value < least)
        ]
        if problems:
            raise UserError(*problems)


def run_sweep(members: Sequence[Member], ledger: Ledger, settings: Settings) -> None:
    """Run what is left to do of every member, and keep the ledger. One member's failure never stops the others.

    Raises `Refusal` when the settings do not fit the members, and KeyboardInterrupt when the user stops it: members
    are saved and the ledger says so.
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
            # All get as far as a rung before anyone is judged there.
            left = [m for m in members if m.status not in FINISHED and m.name not in failed]
            for group in grouped([m for m in left if rung is None or not rung.reached(m)]):
                MemberGroup(group, ledger, settings, progress, rung.step if rung else None).run(inputs_cache)
                failed |= {m.name for m in group if m.status not in (*FINISHED, "paused")}
            if halving and rung:
                for member in halving.judge(rung):
                    progress.update(member.name, status="pruned")


def grouped(members: Sequence[Member]) -> list[list[Member]]:
    """Members that can stand on one inputs, together."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(sharing_key(member.run), []).append(member)
    return list(groups.values())


def sharing_key(run: RunConfig) -> str:
    """Equal for runs that can stand on one inputs."""
    parts = [to_plain(run.data), to_plain(run.model), to_plain(run.quantization), run.trainer.max_length]
    return config_hash({"shared": parts})


class InputsCache:
    """The inputs that was used last, which the next group of members or the next rung may need again."""

    def __init__(self) -> None:
        self.key = ""
        self.latest: SharedInputs | None = None

    def of(self, run: RunConfig) -> "SharedInputs":
        """The inputs of a run. Raises what laying it raises."""
        if self.latest is None or self.key != sharing_key(run):
            self.latest = None  # before the memory is asked for
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
        """Run everybody on their inputs; if that cannot be had, none of them can."""
        runs = [member.run for member in self.members.values()]
        try:
            self.ledger.require_same_data(runs[0].data)
            inputs = inputs_cache.of(runs[0])
            from medtune.sweep.capacity import choose_concurrency  # heavy, and loud before the libraries are quieted

            size = choose_concurrency(runs, inputs, self.settings.width, self.settings.processes)
            for run in runs:  # once for all, and with all cores
                inputs.baseline(run)
        except Exception as error:
            for name in self.members:
                self.refuse(name, error)
            return
        with interruption.deferred():
            self.run_on(inputs, size)
            interruption.raise_if_requested()

    def run_on(self, inputs: "SharedInputs", size: "Concurrency") -> None:
        """Run everybody, as many at a time as the machine holds."""
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
        """Measure the base on the test set with all cores; otherwise one worker would, and the others wait for it."""
        try:
            for member in self.members.values():
                if member.run.eval.final:
                    inputs.evaluate_base(member.run)
        except Exception as error:  # every member meets it after training, and loses no adapter by it
            log.error("the evaluation of the base model on the test set failed: %s", error)

    # What a worker asks and tells; `Workers` puts a pipe between.

    def next(self) -> Member | None:
        """Whose turn it is; None when there are no more, or the user wants to stop."""
        if interruption.stop_requested() or not self.queue:
            return None
        return self.members[self.queue.popleft()]

    def on_progress(self, name: str, **values: Any) -> None:
        """A member told how far it is."""
        self.progress.update(name, **values)
        if values.get("status") == "running":
            self.ledger.update(self.members[name])

    def ended(self, name: str) -> None:
        """A member ended, however it did."""
        member = self.members[name]
        self.ledger.update(member)
        self.progress.update(name, status=member.status, seconds_left=None)

    def refuse(self, name: str, error: Exception) -> None:
        """A member ended before it began."""
        member = self.members[name]
        with isolate_failures(name), log_member(name, member.folder), RunFolder(member.run, member.folder):
            raise error
        self.ended(name)
