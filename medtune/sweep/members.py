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
    """Gives out members and takes reports on them."""

    def next(self) -> Member | None: ...
    def on_progress(self, name: str, **values: Any) -> None: ...
    def ended(self, name: str) -> None: ...


def run_members(queue: MemberQueue, inputs: "SharedInputs", pause_at: int | None) -> None:
    """Runs members one after another until there are no more."""
    while member := queue.next():
        run_member(member, queue, inputs, pause_at)


def run_member(
    member: Member, queue: MemberQueue, inputs: "SharedInputs", pause_at: int | None, handle: "BaseHandle | None" = None
) -> None:
    """Runs one member. What ends it stays with it, and is recorded in its folder."""
    name = member.name
    with isolate_failures(name), log_member(name, member.folder):
        report = partial(queue.on_progress, name)
        train(member.run, member.folder, Membership(inputs, handle, pause_at, report))
    gc.collect()  # models are in reference cycles: without this the next member finds the last one in memory
    queue.ended(name)


@contextmanager
def isolate_failures(name: str) -> Iterator[None]:
    """Keeps the failure of a member from the others. The queue asks whether the user wants to stop."""
    try:
        yield
    except RunPaused:
        pass
    except KeyboardInterrupt:
        if not interruption.stop_requested():
            raise
    except Exception as error:
        log.error("%s did not finish: %s", name, first_line(error))
        if not isinstance(error, UserError | RunFailed):  # raised outside of its result folder
            log.error("traceback", exc_info=error, extra=FILE_ONLY)
        for each in (error, error.__cause__):
            if each is not None:
                traceback.clear_frames(each.__traceback__)  # frames would keep the model in memory
