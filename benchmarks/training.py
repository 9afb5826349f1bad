"""How fast medtune trains, one run and a sweep, beside the script that a good user would write with TRL.

Command: make bench, or python benchmarks/training.py [--rounds 3] [--only single sweep packed overhead memory]

Every measurement is a whole process, or several, from start to exit, with imports, loading and saving. All cases take
turns, in one order and then in the other, so that what else the machine does hits them alike. Both sides train the same
rows in the same order, from the same adapter. After every round BENCHMARKS.md is written: ratios of medians, the single
measurements, where the time goes, and the losses of both sides.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from training_cases import PARTS, RATES, ROOT, SMALL, TINY, Case, case_of
from training_report import TITLE, Measurement, Report, write_section

CORES = 2
LOOK = 3.0  # seconds between two looks at the memory, which hold up whoever is looked at


def main() -> None:
    """Measure every case that is asked for, round after round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "BENCHMARKS.md")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    # Parts measured on their own have a section of their own.
    title = TITLE if options.only == list(PARTS) else f"{TITLE}: {', '.join(options.only)}"
    names = list(dict.fromkeys(name for part in options.only for name in PARTS[part]))
    found: dict[str, list[Measurement]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        rows = Path(temporary) / "rows.json"
        model = prepare_rows(rows)
        for turn in range(options.rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                out = Path(temporary) / f"{turn}-{names.index(name)}"
                result = measure(case_of(name, out, rows, model), out)
                found[name].append(result)
                said = result.error or f"{result.seconds:.1f} s, {result.peak_gb:.2f} GB"
                print(f"round {turn + 1} of {options.rounds}: {name}: {said}", flush=True)
            text = Report(found, options.only).text()
            write_section(options.out, title, text)
    print(f"\n{text}")


def prepare_rows(path: Path) -> str:
    """Write the plain script's rows, with medtune's tokens and labels. Returns the folder of the base.

    It also makes what is made once: converted weights, prepared data, tokens, what the untuned base makes of the
    evaluation rows, and libraries in the system's cache.
    """
    import hydra

    from medtune.config.groups import CONF, register
    from medtune.config.schema import RunConfig
    from medtune.config.validation import build_config
    from medtune.modeling.weights import resolve_weights
    from medtune.training.pipeline import prepare_inputs

    register()
    for overrides in (TINY, SMALL):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            run = build_config(hydra.compose("train", overrides), RunConfig)
        inputs = prepare_inputs(run)
        inputs.untuned(run)
        tokens = inputs.tokens
    splits = {name: getattr(tokens, name).select_columns(["input_ids", "labels"]) for name in ("train", "validation")}
    assert len(splits["validation"]) == 40, "the bundled consultations changed: choose data.validation_size anew"
    path.write_text(json.dumps({name: split.to_list() for name, split in splits.items()}), encoding="utf-8")
    return resolve_weights(run.model)


def measure(case: Case, out: Path) -> Measurement:
    """Run a case in the folder `out`."""
    out.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # no side may wait for a network
    environment.pop("OMP_NUM_THREADS", None)
    if case.at_once > 1:
        environment["OMP_NUM_THREADS"] = str(CORES // case.at_once)

    def execute(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out)

    started, began, peak = time.time(), time.monotonic(), 0
    with ThreadPoolExecutor(case.at_once) as pool:
        processes = [pool.submit(execute, command) for command in case.commands]
        while wait(processes, timeout=LOOK).not_done:
            peak = max(peak, memory())
    result = Measurement(time.monotonic() - began, peak / 1e9)
    for command, process in zip(case.commands, (future.result() for future in processes), strict=True):
        if process.returncode:
            lines = (process.stderr.strip() or process.stdout.strip() or "no message").splitlines()
            result.error = lines[-1].replace(str(out), "FOLDER")
        elif "--rows" in command:
            member = f"r={command[command.index('--r') + 1]}, {command[command.index('--learning-rate') + 1]}"
            read_plain(json.loads(process.stdout.splitlines()[-1]), member, result)
    for run in sorted(out.glob("**/run.json")):
        read_run(run.parent, started, result)
    return result


def memory() -> int:
    """Memory in bytes of every process below this one; a page that several share is divided among them (Linux)."""
    total, processes = 0, psutil.Process().children(recursive=True)
    shared = psutil.LINUX and len(processes) > 1  # looking at every page holds up whoever is looked at
    for process in processes:
        with suppress(psutil.Error, OSError):  # it ended meanwhile
            total += process.memory_full_info().pss if shared else process.memory_info().rss
    return total


def read_plain(said: dict[str, Any], member: str, result: Measurement) -> None:
    """Take over what the plain script printed."""
    result.losses[member], result.eval_loss[member] = said["losses"], said["eval_loss"]
    result.spent = {**said["seconds"], "rest": result.seconds - sum(said["seconds"].values())}


def read_run(folder: Path, started: float, result: Measurement) -> None:
    """Take over what a result folder of medtune holds. `started`: when its process was, in seconds of the epoch."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if run["status"] != "done":
        return
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    lora, trainer = run["configuration"]["lora"], run["configuration"]["trainer"]
    rate = next((rate for rate in RATES if float(rate) == trainer["learning_rate"]), trainer["learning_rate"])
    member = f"r={lora['r']}, {rate}"
    result.losses[member] = [entry["loss"] for entry in history if "loss" in entry]
    result.eval_loss[member] = metrics["final"]["eval_loss"]
    log = (folder / "train.log").read_text(encoding="utf-8")
    times = {
        event: datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").timestamp()
        for at, event in re.findall(r"^\[([^]]+)\].*\] (mask|base|adapter):", log, re.M)
    }
    result.spent = {}
    if len(times) == 3:  # of a single run; in a sweep members share these
        result.spent = {"import": times["mask"] - started, "load": times["base"] - times["mask"]}
        result.spent["evaluate the untuned base"] = times["adapter"] - times["base"]
    result.spent["train"] = metrics["training_seconds"]
    result.spent["evaluate"] = next(entry["eval_seconds"] for entry in reversed(history) if "eval_loss" in entry)
    result.spent["answers"] = metrics["answering_seconds"]
    result.spent["rest"] = result.seconds - sum(result.spent.values())


if __name__ == "__main__":
    main()
