"""medtune's commands as processes of their own, forked from one that has imported everything already.

A new Python takes ten seconds to import torch, transformers and TRL; a fork of one that has takes none. What a user
sees stays: arguments, signals, exit status, both outputs. Where importing itself, or an engine that starts processes of
its own, is what is tested, Python is started anew.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
IMPORTED = [
    "medtune.data.display",
    "medtune.data.pipeline",
    "medtune.evaluation.pipeline",
    "medtune.sweep.lockstep",
    "medtune.sweep.workers",
    "medtune.training.trainer",
    "transformers.models.llama.modeling_llama",
    "bitsandbytes",
]
SERVER.set_forkserver_preload(IMPORTED)


class Command:
    """A command that runs: of `subprocess.Popen`, what tests need. Both outputs are pipes."""

    def __init__(self, program: str | Path, *words: str, cwd: Path = ROOT, **environment: str) -> None:
        """`program`: a module's name, or a script's path."""
        pipes = [SERVER.Pipe(duplex=False) for _ in range(2)]
        child = (program, words, cwd, os.environ | environment, *(end for _, end in pipes))
        self.args = [str(program), *words]
        self.process = SERVER.Process(target=become, args=child)
        self.process.start()
        for _, end in pipes:
            end.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno()), encoding="utf-8") for end, _ in pipes)
        assert self.process.pid
        self.pid: int = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Waits until it has ended; raises `TimeoutExpired`."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutExpired(self.args, timeout or 0.0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits until it has ended; returns what it wrote to both outputs. Raises `TimeoutExpired`."""
        with self.stdout, self.stderr, ThreadPoolExecutor() as threads:
            out, error = (threads.submit(stream.read) for stream in (self.stdout, self.stderr))
            try:
                self.wait(timeout)
            except TimeoutExpired:
                self.process.kill()
                raise
            return out.result(), error.result()


def run(program: str | Path, *words: str, cwd: Path = ROOT, **environment: str) -> CompletedProcess[str]:
    """Runs `python -m PROGRAM WORDS…` to its end."""
    command = Command(program, *words, cwd=cwd, **environment)
    out, error = command.communicate()
    assert command.returncode is not None
    return CompletedProcess(command.args, command.returncode, out, error)


def become(
    program: str | Path,
    words: tuple[str, ...],
    cwd: Path,
    environment: Mapping[str, str],
    out: Connection,
    error: Connection,
) -> None:
    """In the forked process: be what was asked for."""
    import torch

    assert set(IMPORTED) <= set(sys.modules), "the server keeps to itself that it could not import something"
    gc.freeze()  # what was imported is never garbage: do not walk it
    # A shell that runs the tests in the background makes them ignore Ctrl-C, and so their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for connection, descriptor in ((out, 1), (error, 2)):
        os.dup2(connection.fileno(), descriptor)
        connection.close()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))  # read from the environment at import
    sys.argv = [str(program), *words]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        sys.path.insert(0, "")  # as python -m does
        runpy.run_module(program, run_name="__main__", alter_sys=True)
