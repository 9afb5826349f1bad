"""sweep.json: which members a sweep has, and how far each of them is. It outlives the process that writes it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medtune.config.resolvers import folder_name
from medtune.config.schema import Data, RunConfig
from medtune.config.serialize import config_diff, config_hash, to_plain
from medtune.runtime.errors import UserError
from medtune.runtime.files import read_json, write_json
from medtune.runtime.status import FINISHED

log = logging.getLogger(__name__)


@dataclass
class Member:
    """One run of a sweep: what it is called, and where its results go."""

    name: str
    run: RunConfig
    folder: Path

    @property
    def key(self) -> str:
        """Equal for the same run, whatever it is called."""
        return config_hash(to_plain(self.run))

    @property
    def status(self) -> str:
        """As its run.json has it."""
        return read_json(self.folder / "run.json").get("status", "waiting")

    @property
    def eval_loss(self) -> float | None:
        """The best so far, in nats per target token."""
        return read_json(self.folder / "metrics.json").get("best", {}).get("eval_loss")


class Ledger:
    """The members of a sweep folder, in the order in which they came."""

    def __init__(self, sweep: Path, command: Sequence[str]) -> None:
        self.path = sweep / "sweep.json"
        kept = read_json(self.path)
        self.command = list(command)
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in kept.get("members", [])}
        self.rungs: list[dict[str, Any]] = kept.get("rungs", [])

    @property
    def folders(self) -> list[Path]:
        """Of all members, also of those that an earlier command brought."""
        return [self.path.parent / row["folder"] for row in self.rows.values()]

    def add_members(self, members: Sequence[Member]) -> None:
        """Adds members, or finds the rows and the folders that they have already.

        Raises `UserError` when two are the same, or a folder holds another run than its member.
        """
        problems = []
        named = {row["folder"]: row for row in self.rows.values()}
        seen: dict[str, str] = {}
        for member in members:
            if member.key in seen:
                problems.append(f"two members are the same: {seen[member.key]} and {member.name}")
            seen[member.key] = member.name
            if member.key in self.rows:
                member.folder = self.path.parent / self.rows[member.key]["folder"]
                continue
            before = named.get(member.folder.name) or read_json(member.folder / "run.json")
            if before and (changed := config_diff(before.get("configuration", {}), to_plain(member.run))):
                problems.append(
                    f"{member.folder} holds a member that differs in {', '.join(changed)}: name another sweep folder"
                )
        if problems:
            raise UserError(*problems)
        if forgotten := [row for key, row in self.rows.items() if key not in seen and row["status"] not in FINISHED]:
            log.warning(
                "%s members that an earlier command began here are not finished: run that command again for them",
                len(forgotten),
            )
        for member in members:
            self.rows.setdefault(member.key, {"key": member.key, "configuration": to_plain(member.run)})
            if member.status == "running":  # its process is gone, or this one would not have got the lock
                facts = read_json(member.folder / "run.json")
                write_json(member.folder / "run.json", facts | {"status": "interrupted", "error": "its process ended"})
            self.refresh_row(member)
        self.write()

    def require_same_data(self, data: Data) -> None:
        """Raises `UserError` when finished members were trained on other data, though it has the same name."""
        done = [row for row in self.rows.values() if row["status"] in FINISHED]
        alike = [row for row in done if row["configuration"]["data"] == to_plain(data)]
        if not alike:
            return
        from medtune.data.prepared import prepare  # not before there is something to compare with

        found = prepare(data).fingerprint
        for row in alike:
            facts = read_json(self.path.parent / row["folder"] / "run.json")
            if facts.get("data_fingerprint", found) != found:
                raise UserError(
                    f"the data is no longer what {row['overrides']} was trained on, so that members could not be "
                    "compared: name another sweep folder"
                )

    def refresh_row(self, member: Member) -> None:
        """Brings a member's row up to date with its folder."""
        facts = read_json(member.folder / "run.json")
        self.rows[member.key] |= {
            "overrides": member.name,
            "folder": member.folder.name,
            "status": member.status,
            "error": facts.get("error"),
            "seconds": facts.get("seconds"),
            "eval_loss": member.eval_loss,
        }

    def update(self, member: Member) -> None:
        """Records where a member is."""
        self.refresh_row(member)
        self.write()

    def write(self) -> None:
        """Writes sweep.json."""
        write_json(self.path, {"command": self.command, "members": list(self.rows.values())} | {"rungs": self.rungs})


@contextmanager
def open_ledger(sweep: Path, command: Sequence[str]) -> Iterator[Ledger]:
    """Opens the ledger of a sweep folder, for one process at a time.

    Raises `UserError` when another process has it, or the folder cannot be written.
    """
    try:
        sweep.mkdir(parents=True, exist_ok=True)
        lock = FileLock(sweep / ".lock")
        # A process that was killed takes a moment to be gone, with all of its workers.
        lock.acquire(timeout=5)
    except Timeout:
        raise UserError(f"{sweep} is in use by another process: wait for it, or name another sweep folder") from None
    except OSError as error:
        raise UserError(
            f"cannot write results to {sweep} ({error.strerror}): choose another with sweep=FOLDER"
        ) from None
    try:
        yield Ledger(sweep, command)
    finally:
        lock.release()


def names(overrides: Sequence[Sequence[str]], common: Sequence[str]) -> list[str]:
    """Returns what members are called: of the overrides of each, those that are not the same for all.

    `common`: keys that have one value in the whole sweep, of which these may be a part. A member that has no others is
    called by all of its overrides.
    """
    differing = [place for place, word in enumerate(overrides[0]) if common and word.partition("=")[0] not in common]
    if not differing:
        differing = [place for place, values in enumerate(zip(*overrides, strict=True)) if len(set(values)) > 1]
    return [",".join(words[place] for place in differing) or ",".join(words) for words in overrides]


def folder_of(sweep: Path, name: str) -> Path:
    """Returns where a member's results go, until the ledger knows better."""
    return sweep / folder_name([name])
