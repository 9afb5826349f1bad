"""Members that train together: one pass through the frozen base for all of them.

Every member is an ordinary trainer in a thread of its own, and one thread runs at a time. A member whose forward pass
in training reaches the base waits there until all others have come as far; then the base runs once over the rows of
all, and each member's adapter acts on its own rows. Backward likewise. All else, from the order of the data to the
checkpoints, is the member's own, so that a member of a group equals the same run alone, up to rounding.
"""

import logging
import threading
import traceback
from collections.abc import Callable
from contextvars import Context
from typing import Any

import torch
from transformers import PreTrainedModel

from medtune.modeling.memory import free_memory, is_out_of_memory
from medtune.modeling.multi_lora.backbone import Backbone, ForwardPass, MicroBatch, accumulate, proxy_base
from medtune.sweep import thread_state as turns

log = logging.getLogger(__name__)

Job = Callable[["LockstepHandle"], object]  # what a member does with its place in the group; its failures are its own


class LockstepHandle:
    """A member's place in the group."""

    def __init__(self, group: "LockstepGroup", job: Job) -> None:
        self.group, self.job = group, job
        self.turn = threading.Semaphore(0)
        self.state = turns.initial()
        self.waiting = self.yielded = self.done = False
        self.batch: MicroBatch | None = None  # on their way through the base, until the backward pass is done
        self.hidden: torch.Tensor | None = None  # what the member got for them, and where its gradient will be
        self.error: BaseException | None = None  # of a pass, raised in the member
        self.thread = threading.Thread(target=self.live, daemon=True)

    @property
    def checkpointing(self) -> bool:
        """Whether the group recomputes activations."""
        return self.group.checkpointing

    def live(self) -> None:
        """Does what the member's thread is for: runs the job."""
        self.turn.acquire()
        turns.restore(self.state)
        try:
            self.job(self)
        except BaseException as error:
            self.group.errors.append(error)  # a job keeps its member's failures to itself
        self.done = True
        self.batch = self.hidden = None
        self.group.next_turn(self)

    def give_turn(self) -> None:
        """Lets others run until it is this member's turn again."""
        self.state = turns.snapshot()
        self.group.next_turn(self)
        self.turn.acquire()
        turns.restore(self.state)

    def wait(self) -> None:
        """Waits until the pass that this member waits for is done, while others run. Raises what the pass raised."""
        self.waiting = True
        self.give_turn()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def view(self) -> PreTrainedModel:
        """Returns the base as this member sees it; attach an adapter and train it as usual."""
        return proxy_base(self.group.base, self.forward)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Waits for the pass that takes these rows; returns their hidden states [rows, length, width]."""
        self.batch = batch
        self.wait()
        assert self.hidden is not None
        return self.hidden

    def backward(self) -> None:
        """Takes the gradient that the member's own backward pass left at the base's output through the base."""
        assert self.hidden is not None and self.hidden.grad is not None
        self.wait()
        self.batch = self.hidden = None

    def release(self) -> None:
        """Does nothing: the group lets go of it when the member ends."""

    def yield_turn(self) -> None:
        """Lets the others queue their work on the GPU before this member waits for it: else it would idle."""
        self.yielded = True
        self.give_turn()
        self.yielded = False


class LockstepGroup:
    """Runs jobs, at most `width` at a time, on one frozen base."""

    def __init__(self, base: PreTrainedModel, width: int, checkpointing: bool, attention: str, longest: int) -> None:
        self.base, self.width, self.checkpointing = base, width, checkpointing
        self.backbone = Backbone(base, checkpointing, attention, longest)
        self.together = width  # rows of so many members go through the base at a time; fewer when memory is short
        self.handles: list[LockstepHandle] = []
        self.pending: tuple[list[LockstepHandle], ForwardPass] | None = None
        self.finished = threading.Event()
        self.errors: list[BaseException] = []

    def run(self, next_job: Callable[[], Job | None]) -> None:
        """Runs jobs until `next_job` has no more. A member that ends makes place for the next; the others go on."""
        self.next_job, before = next_job, turns.snapshot()
        self.finished.clear()
        while len(self.handles) < self.width and (job := next_job()):
            self.start_job(job)
        if self.handles:
            self.handles[0].turn.release()
            self.finished.wait()
        turns.restore(before)
        for error in self.errors:
            raise error

    def start_job(self, job: Job) -> None:
        """Gives a job its thread."""
        handle = LockstepHandle(self, job)
        self.handles.append(handle)
        handle.thread.start()

    def next_turn(self, handle: LockstepHandle) -> None:
        """Called by the member that has the turn when it waits, yields or ends: gives the turn to the next one."""
        try:
            if handle.done:
                self.replace_member(handle)
            # More than once where those that a pass was for have ended since: others wait for theirs.
            while self.handles and all(other.waiting for other in self.handles):
                self.run_pass()
        except BaseException as error:  # of the group itself: nobody would ever have the turn again
            self.errors.append(error)
            self.handles.clear()
        self.wake_next()

    def replace_member(self, handle: LockstepHandle) -> None:
        """Lets go of a member that ended, and starts the next job, if there is one."""
        self.handles.remove(handle)
        if self.pending is None:
            self.backbone.release()  # the next member needs the memory
        if job := self.next_job():
            self.start_job(job)

    def wake_next(self) -> None:
        """Gives the turn to a member that can go on, those that yielded last; ends the run when none is left."""
        if not self.handles:
            self.finished.set()
            return
        ready = [other for other in self.handles if not other.waiting]
        min(ready, key=lambda other: other.yielded).turn.release()

    def run_pass(self) -> None:
        """Runs a pass, as all wait for one. The backward pass comes first, because its memory is free after it."""
        if self.pending:
            (handles, passed), self.pending = self.pending, None
            self.backward(handles, passed)
            handles = [handle for handle in handles if not handle.done]
        else:
            # Who waited longest comes first, so that nobody starves when not all go together.
            first = self.handles[0].batch
            handles = [h for h in self.handles if h.batch and first and h.batch.autocast == first.autocast]
            handles = self.forward(handles[: self.together])
        for handle in handles:
            handle.waiting = False
            self.handles.remove(handle)
            self.handles.append(handle)

    def forward(self, handles: list[LockstepHandle]) -> list[LockstepHandle]:
        """Gives members their hidden states, fewer of them if that fails; returns them. The others go on waiting."""
        passed = self.attempt(handles, lambda: self.run_backbone(handles))
        if passed is None:
            return self.forward(handles[: half(handles)]) if len(handles) > 1 else handles
        self.pending = handles, passed
        for handle, hidden in zip(handles, passed.split(passed.output.detach()), strict=True):
            handle.hidden = hidden.requires_grad_()
        return handles

    def run_backbone(self, handles: list[LockstepHandle]) -> ForwardPass:
        """Runs the rows of members through the base model."""
        return self.backbone.forward([handle.batch for handle in handles if handle.batch is not None])

    def backward(self, handles: list[LockstepHandle], passed: ForwardPass | None) -> None:
        """Adds to each member's adapter its gradients; through a new pass of fewer members if that fails.

        A repeated pass has the same dropout, and gradients are added when all are there: none is added twice.
        `passed`: the pass of just these members; some may have ended since.
        """
        going = [handle for handle in handles if not handle.done]
        if not going:
            return
        if passed:
            added = self.attempt(going, lambda: self.add_gradients(handles, passed))
        else:
            added = self.attempt(going, lambda: self.add_gradients(going, self.run_backbone(going)))
        if not added and len(going) > 1:
            if passed:
                del passed.output, passed.backward  # the caller holds the pass
                self.backbone.release()
            for part in (going[: half(going)], going[half(going) :]):
                self.backward(part, None)

    def add_gradients(self, handles: list[LockstepHandle], passed: ForwardPass) -> bool:
        """Adds gradients to those members of a pass that still wait for theirs."""
        found = [None if handle.done or handle.hidden is None else handle.hidden.grad for handle in handles]
        assert all(handle.done or gradient is not None for handle, gradient in zip(handles, found, strict=True))
        accumulate(passed.gradients(found))
        return True

    def attempt(self, handles: list[LockstepHandle], work: Callable[[], Any]) -> Any:
        """Returns what `work` gives, or None if it fails.

        A single member has the error then; several are to be tried in parts.
        When memory is the reason, fewer go together from now on.
        """
        try:
            return work()
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the memory
            if len(handles) == 1:
                handles[0].error = error
            elif is_out_of_memory(error):
                self.together = half(handles)
                words = "out of memory: %s members go through the base at a time from now on"
                Context().run(log.warning, words, self.together)  # said by the group, not by the member that serves
        free_memory()
        return None


def half(handles: list[LockstepHandle]) -> int:
    """Returns how many to try together when all were too many."""
    return (len(handles) + 1) // 2
