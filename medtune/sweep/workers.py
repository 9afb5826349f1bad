"""Members on several cores: processes forked from the one that holds the base, which all of them read.

On a CPU only: a forked process cannot use a GPU. The parent gives out members, follows their progress, keeps the ledger
and draws the view. A worker that dies costs its member; a parent that dies takes its workers with it.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from medtune.runtime import interruption
from medtune.runtime.logs import add_member_name
from medtune.sweep.ledger import Member
from medtune.sweep.members import MemberQueue

log = logging.getLogger(__name__)

HEARTBEAT = 0.5  # seconds between two looks at whether the user wants to stop


class GroupQueue(MemberQueue, Protocol):
    """The queue of the parent. `queue`: names of the members that wait. `refuse` ends one that could not go on."""

    queue: Any

    def refuse(self, name: str, error: Exception) -> None: ...


class WorkerConnection(QueueHandler):
    """A worker's connection to the parent: asks for members, reports on them, and hands over log records."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # enqueue needs no queue
        self.connection, self.talking = connection, threading.Lock()

    def send(self, *message: Any) -> None:
        with self.talking:
            self.connection.send(message)

    def next(self) -> Member | None:
        """Returns the next member; None when there are no more."""
        if interruption.stop_requested():
            return None
        self.send("next")
        return self.connection.recv()

    def on_progress(self, name: str, **values: Any) -> None:
        self.send("on_progress", name, values)

    def ended(self, name: str) -> None:
        self.send("ended", name)

    def enqueue(self, record: logging.LogRecord) -> None:
        self.send("log", record)


class Workers:
    """`count` processes of one thread each that run the members of a group."""

    def __init__(self, group: GroupQueue, count: int) -> None:
        self.group, self.count = group, count
        self.fork = multiprocessing.get_context("fork")
        self.processes: dict[Connection, BaseProcess] = {}
        self.busy: dict[Connection, str] = {}  # the member that each is at
        self.served: set[Connection] = set()  # those that have had a member: they can start
        self.alive = os.pipe()  # nothing is written: its end tells the workers that the parent is gone

    def run(self, work: Callable[[WorkerConnection], None]) -> None:
        """Runs until all members had their turn, or the user stops it."""
        told = False
        try:
            for _ in range(self.count):
                self.start(work)
            while self.processes:
                for connection in wait(list(self.processes), HEARTBEAT):
                    assert isinstance(connection, Connection)
                    try:
                        message = connection.recv()
                    except (EOFError, OSError):
                        self.on_exit(connection)
                        if connection in self.served and self.group.queue and not interruption.stop_requested():
                            self.start(work)
                    else:
                        self.on_message(connection, *message)
                if interruption.stop_requested() and not told:
                    told = True
                    for process in self.processes.values():
                        process.terminate()
        finally:
            for process in self.processes.values():
                process.kill()
            for end in self.alive:
                os.close(end)

    def start(self, work: Callable[[WorkerConnection], None]) -> None:
        """Forks one worker."""
        ours, theirs = self.fork.Pipe()
        process = self.fork.Process(target=self.worker_main, args=(work, theirs, [ours, *self.processes]))
        process.start()
        theirs.close()
        self.processes[ours] = process

    def on_message(self, connection: Connection, kind: str, *told: Any) -> None:
        """Answers a message of a worker."""
        if kind == "next":
            member = self.group.next()
            if member:
                self.busy[connection] = member.name
                self.served.add(connection)
            with contextlib.suppress(OSError):  # it died meanwhile, which the next look tells
                connection.send(member)
        elif kind == "on_progress":
            self.group.on_progress(told[0], **told[1])
        elif kind == "ended":
            del self.busy[connection]
            self.group.ended(told[0])
        else:
            logging.getLogger(told[0].name).handle(told[0])

    def on_exit(self, connection: Connection) -> None:
        """Cleans up after a worker that ended; a member that it was in the middle of failed."""
        process = self.processes.pop(connection)
        connection.close()
        process.join()
        name = self.busy.pop(connection, None)
        if name:
            code = process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            advice = ": perhaps for lack of memory, try hydra.launcher.processes=1" if code == -signal.SIGKILL else ""
            self.group.refuse(name, RuntimeError(f"its process {how}{advice}"))

    def worker_main(
        self, work: Callable[[WorkerConnection], None], connection: Connection, others: list[Connection]
    ) -> None:
        """Runs in the worker, from the fork to its end."""
        for other in others:
            other.close()
        os.close(self.alive[1])
        threading.Thread(target=end_with_parent, args=(self.alive[0],), daemon=True).start()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which tells the workers
        signal.signal(signal.SIGTERM, interruption.request_stop)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # the view draws in the parent
        line = WorkerConnection(connection)
        line.addFilter(add_member_name)
        logging.getLogger().handlers[:] = [line]
        import torch

        torch.set_num_threads(1)
        # A parent that is gone needs no answer.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):
            work(line)


def end_with_parent(alive: int) -> None:
    """Ends this process when the parent ends, for whatever reason."""
    os.read(alive, 1)
    os._exit(1)
