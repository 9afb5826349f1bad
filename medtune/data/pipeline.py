"""One set, from its sources to its splits on disk. Rows stream; only what they are compared by stays in memory."""

import gc
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from medtune.config.schema import Data, Source
from medtune.data.cleaning.decontamination import benchmark_ngrams
from medtune.data.cleaning.screening import ProcessedRows, RowProcessor
from medtune.data.funnel import RowStats, describe, describe_rules, require_splits
from medtune.data.reading.formats import detect_format
from medtune.data.reading.normalize import answer_of, question_of
from medtune.data.reading.sources import Row, expected_rows, location, read_rows
from medtune.data.splitting.selection import Selection, apply_caps_and_weights, select
from medtune.data.splitting.split import TRAIN, leakage
from medtune.data.store import SPLITS, ConversationTable, Reject, Writer, write_rejects
from medtune.runtime.errors import UserError
from medtune.runtime.progress import show_bars

CHUNK = 1000  # rows that travel to a worker together
ALONE = 4000  # rows up to which starting workers costs more than it saves

LEFT_OUT = -1

worker: dict[str, RowProcessor] = {}  # of this process, if it is a worker


def sources_of(data: Data) -> dict[str, Source]:
    """Returns the sources of a set by their dotted key: its members, or itself."""
    return {f"data.members.{name}": member for name, member in data.members.items()} or {"data": data}


def build_splits(data: Data, folder: Path) -> None:
    """Prepares `data` into `folder`: train, validation and test as Arrow files, rejects.jsonl and report.json.

    Raises `UserError` as `medtune.data.prepare` does.
    """
    with (folder / "rejects.jsonl").open("w", encoding="ascii") as rejects:
        seen, screened = screen_all(data, folder, rejects)
        keys = seen.keys()
        conversations = ConversationTable(screened)

        @lru_cache(maxsize=4096)  # near duplicates are compared with dozens of rows, one soon after another
        def texts(row: int) -> tuple[str, str]:
            messages = conversations[row].messages
            return question_of(messages), answer_of(messages)

        def number(row: int) -> str:
            return f"row {seen.rows[row]}" + (f" of {seen.names[row]}" if data.members else "")

        selection = select(keys, data, texts, number)
        apply_caps_and_weights(selection, seen.names, list(sources_of(data).values()))
        fingerprint, train_rows = write_splits(data, conversations, selection, seen, folder, rejects)
    kept = np.array([row for row in range(len(seen.rows)) if row not in selection.left_out], np.int64)
    counted = describe(data, seen, selection, kept)
    require_splits(counted, seen)
    leaks = leakage(
        selection.splits[kept],
        keys.question[kept],
        [selection.groups[row] for row in kept],
        keys.bands[kept],
        lambda place: texts(int(kept[place]))[0],
        1 - counted["splits"]["train"] / len(kept),
    )
    if leaks.share > data.max_leakage:
        first = "; ".join(f"{number(int(kept[a]))} and {number(int(kept[b]))}" for a, b in leaks.examples[:2])
        raise UserError(
            f"{leaks.share:.1%} of the held-out questions stand in another split too (as {first}), more than "
            f"data.max_leakage={data.max_leakage:g}: give rows that belong together one group, or raise the limit"
        )
    screened.unlink()
    report = {**counted, "train_rows": train_rows, "leakage": asdict(leaks), "fingerprint": fingerprint}
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def screen_all(data: Data, folder: Path, rejects: Any) -> tuple[RowStats, Path]:
    """Screens every row of every source into one Arrow file. Returns what is known of the rows, and the file."""
    seen, screened = RowStats(), folder / "screened.arrow"
    benchmarks = benchmark_ngrams(data.benchmarks, data.benchmark_words)
    with Writer(screened) as writer:
        for place, source in sources_of(data).items():
            rows = read_rows(source, place)
            first = list(islice(rows, CHUNK))
            layout = detect_format(first, source, place)
            before = seen.read
            expected = expected_rows(source, first)
            screen = RowProcessor(data, source, layout, benchmarks)
            with tqdm(desc=source.name, unit=" rows", total=expected, disable=not show_bars()) as bar:
                for size, part in in_parallel(screen, chain(first, rows), expected):
                    writer.write(part.batch)
                    write_rejects(rejects, part.rejects)
                    seen.add(part, source.name)
                    seen.read += size
                    bar.update(size)
            seen.described.append(
                {
                    "name": source.name,
                    "from": location(source),
                    "layout": str(layout),
                    "license": source.license,
                    "redistributable": source.redistributable,
                    "rows": seen.read - before,
                }
            )
    if not seen.rows:
        why = describe_rules(seen) if seen.read else "there are no rows"
        raise UserError(f"{', '.join(map(location, sources_of(data).values()))}: no usable conversation: {why}")
    return seen, screened


def in_parallel(screen: RowProcessor, rows: Iterator[Row], expected: int | None) -> Iterator[tuple[int, ProcessedRows]]:
    """Screens rows in chunks, in order; in worker processes where there are many rows and several processors.

    Yields (rows read, what came of them). Raises `UserError` when the system ends a worker.
    """
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    for chunk in islice(chunks, 0 if expected and expected > 10 * ALONE else ALONE // CHUNK):
        yield len(chunk), screen(chunk)
    following = next(chunks, None)
    if following is None:
        return
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # spawn: a forked worker would inherit the locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, start_worker, (screen,)) as pool:
            waiting: deque[tuple[int, Future[ProcessedRows]]] = deque()
            for chunk in chain([following], chunks):
                with ignore_sigint():
                    waiting.append((len(chunk), pool.submit(screen_in_worker, chunk)))
                if len(waiting) > 2 * workers:  # no more, or all rows would wait in memory
                    size, future = waiting.popleft()
                    yield size, future.result()
            for size, future in waiting:
                yield size, future.result()
    except BrokenProcessPool:
        raise UserError(
            "the system ended a process that prepares the data, most likely for want of memory: close other programs, "
            "or split the file"
        ) from None


@contextmanager
def ignore_sigint() -> Iterator[None]:
    """Starts worker processes that leave Ctrl-C to their parent from their first moment: they inherit the ignoring."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def start_worker(screen: RowProcessor) -> None:
    """Sets up a worker process."""
    gc.disable()  # rows hold no reference cycles, and looking for some costs time
    worker["screen"] = screen


def screen_in_worker(chunk: Sequence[Row]) -> ProcessedRows:
    """Screens a chunk in a worker process."""
    return worker["screen"](chunk)


def write_splits(
    data: Data, conversations: ConversationTable, selection: Selection, seen: RowStats, folder: Path, rejects: Any
) -> tuple[str, int]:
    """Writes every screened row to its split, as often as its source's weight says, or to the rejects.

    Returns the SHA-256 of the splits, and the rows of the training split.
    """
    weights = {source.name: source.weight for source in sources_of(data).values()}
    splits = selection.splits.copy()
    splits[list(selection.left_out)] = LEFT_OUT
    contents = [hashlib.sha256() for _ in SPLITS]
    start = train_rows = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(Writer(folder / f"{name}.arrow")) for name in SPLITS]
        for batch in conversations.table.to_batches(max_chunksize=CHUNK):
            places = np.arange(start, start + batch.num_rows)
            start += batch.num_rows
            groups = pa.array([selection.groups[place] for place in places], pa.string())
            batch = batch.set_column(batch.schema.get_field_index("group"), "group", groups)
            for split, (writer, content) in enumerate(zip(writers, contents, strict=True)):
                own = np.flatnonzero(splits[places] == split)
                if split == TRAIN:
                    own = np.repeat(own, [times_shown(weights[seen.names[place]], place) for place in places[own]])
                    train_rows += len(own)
                rows = batch.take(own)
                writer.write(rows)
                content.update("".join(f"{tuple(row.values())}\n" for row in rows.to_pylist()).encode())
            out = np.flatnonzero(splits[places] == LEFT_OUT)
            for row, place in zip(batch.take(out).to_pylist(), places[out].tolist(), strict=True):
                reject = Reject(row["row"], seen.names[place], *selection.left_out[place], json.loads(row["messages"]))
                seen.count(reject)
                write_rejects(rejects, [reject])
    return hashlib.sha256(b"".join(content.digest() for content in contents)).hexdigest(), train_rows


def times_shown(weight: float, place: int) -> int:
    """Returns how often a training row stands in the set: a weight of 2.5 shows every row twice, every second a third
    time.
    """
    whole = int(weight)
    return max(1, whole + (int((place + 1) * (weight - whole)) > int(place * (weight - whole)))) if weight > 1 else 1
