"""Reading and writing of small files."""

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one piece: neither a reader nor a crash ever sees half a file."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def utc_now() -> str:
    """Returns the time in UTC, in ISO format to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def display_path(path: Path) -> str:
    """Returns a path relative to the working directory if it is inside it."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if the file is missing or incomplete."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the objects in a file of JSON lines, without a last line that was cut off; none without a file."""
    return json_lines(path.read_bytes()) if path.is_file() else []


def json_lines(content: bytes) -> list[dict[str, Any]]:
    """Returns the objects in the content of a file of JSON lines, without a last line that was cut off.

    Only a line feed ends a line: texts hold other characters that Python's `splitlines` ends one at.
    """
    return [json.loads(line) for line in content.split(b"\n")[:-1] if line]


def append_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends `rows` to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
