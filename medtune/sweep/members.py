"""Runs one member and keeps its failure from the others."""

import gc
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from medtune.runtime import interruption
from medtune.runtime.errors import RunFailed, RunPaused, UserError, first_line
from medtune.runtime.logs import FILE_ONLY, log_member
from medtune.sweep.ledger import Member
from medtune.training.pipeline import Membership, train

if TYPE_CHECKING:
    from medtune.modeling.multi_lora.handle import BaseHandle
    from medtune.training.shared_inputs import SharedInputs

log = logging.getLogger(__name__)


class MemberQueue(Protocol):
    """Who gives out members and hears of them."""

    queue: Any

    def next(self) -> Member | None: ...
    def on_progress(self, name: str, **values: Any) -> None: ...
    def ended(self, name: str) -> None: ...
    def refuse(self, name: str, error: Exception) -> None: ...


def run_members(queue: Any, inputs: "SharedInputs", pause_at: int | None) -> None:
    """Run members one after another until there are no more. `queue`: a `Crew`, or a worker's line to it."""
    while member := queue.next():
        run_member(member, queue, inputs, pause_at)


def run_member(
    member: Member, queue: Any, inputs: "SharedInputs", pause_at: int | None, handle: "BaseHandle | None" = None
) -> None:
    """Run one member; whatever ends it is its own, and is in its folder."""
    name = member.name
    with isolate_failures(name), log_member(name, member.folder):
        report = partial(queue.on_progress, name)
        train(member.run, member.folder, Membership(inputs, handle, pause_at, report))
    gc.collect()  # a model is part of reference cycles: without this the next member meets it in memory
    queue.ended(name)


@contextmanager
def isolate_failures(name: str) -> Iterator[None]:
    """Keep what ends a member from the others. An interruption is not lost: whoever gives out members asks for it."""
    try:
        yield
    except RunPaused:
        pass
    except KeyboardInterrupt:
        if not interruption.stop_requested():
            raise
    except Exception as error:
        log.error("%s did not finish: %s", name, first_line(error))
        if not isinstance(error, UserError | RunFailed):  # from outside of its result folder
            log.error("traceback", exc_info=error, extra=FILE_ONLY)
        for each in (error, error.__cause__):
            if each is not None:
                traceback.clear_frames(each.__traceback__)  # they would keep the member's model in memory
