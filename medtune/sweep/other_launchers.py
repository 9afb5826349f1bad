"""The end of a sweep whose members another launcher ran, or another sweeper chose: the table, and who did not finish.

Members may run elsewhere, each as a run of its own; this process knows them by their folders.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from medtune.runtime.errors import RunFailed, UserError
from medtune.runtime.files import read_json
from medtune.runtime.status import FINISHED

announced: list[Path] = []


class MultirunObserver(Callback):
    """Hydra's callback: notes the folder of a sweep whose end medtune's own launcher will not see."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        choices = config.hydra.runtime.choices
        if (choices["hydra/launcher"], choices["hydra/sweeper"]) != ("shared_base", "basic"):
            announced[:] = [Path(config.hydra.sweep.dir).absolute()]


@contextmanager
def report_external_sweep() -> Iterator[None]:
    """Prints the table of an observed sweep. Raises `RunFailed` that names all members that did not finish."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    folders = sorted(path.parent for sweep in announced for path in sweep.glob("*/run.json"))
    if not folders:  # nothing began, or medtune's own launcher has said it all
        if error:
            raise error
        return
    from medtune.results.tables import print_summary  # reads Parquet: nothing that a mistyped sweep should wait for

    print_summary(folders)
    runs = {folder.name: read_json(folder / "run.json") for folder in folders}
    failed = [
        f"{name}: {str(run.get('error') or 'not over: its process was killed, or runs on elsewhere').splitlines()[0]}"
        for name, run in runs.items()
        if run.get("status") not in FINISHED
    ]
    if failed or error:
        lines = [f"{len(failed)} of {len(runs)} members failed", *failed]
        if error and not isinstance(error, RunFailed | UserError):  # the launcher's own
            lines.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise RunFailed("\n".join(lines)) from error
