"""How fast data is prepared, and in how much memory. Command: make bench

250,000 synthetic consultations in the layout of ai_medical_chatbot (Description, Patient, Doctor), built of the bundled
ones' sentences: 4 % repeat a row, 2 % nearly do, half of the answers end in the promotion line of the real set.
"""

import csv
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = 250_000
BUNDLED = Path(__file__).parents[1] / "medtune" / "data" / "consultations.jsonl"
PREPARE = """
import sys, time
from hydra import compose, initialize_config_dir
from medtune.config.groups import CONF, register
from medtune.config.schema import RunConfig
from medtune.config.validation import build_config
from medtune.data.prepared import prepare
if __name__ == "__main__":
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = build_config(compose("train", sys.argv[1:]), RunConfig).data
    began = time.monotonic()
    prepared = prepare(data)
    print(time.monotonic() - began, *prepared.report["funnel"].values(), sep="\\n")
"""


def sentences(role: str) -> list[str]:
    """Every sentence that patients (user) or doctors (assistant) say in the bundled consultations."""
    rows = [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]
    texts = [m["content"] for row in rows if not row["red_flag"] for m in row["messages"] if m["role"] == role]
    return sorted({s for text in texts for s in re.split(r"(?<=[.?!])\s+", text) if 20 < len(s) < 200})


def write_rows(path: Path, count: int) -> None:
    """Write `count` consultations as CSV."""
    dice = random.Random(0)
    asked, answered = sentences("user"), sentences("assistant")
    recent: list[tuple[str, str, str]] = []
    with path.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["Description", "Patient", "Doctor"])
        for _ in range(count):
            kind = dice.random()
            if recent and kind < 0.06:
                title, patient, doctor = dice.choice(recent)
                if kind < 0.02:
                    patient += f" This started {dice.randint(2, 30)} days ago."
            else:
                facts = f"I am {dice.randint(18, 90)} years old and weigh {dice.randint(45, 140)} kg."
                patient = " ".join(["Hello doctor,", *dice.sample(asked, 5), facts])
                doctor = " ".join(dice.sample(answered, 5)).lower().replace(",", "")
                if dice.random() < 0.5:
                    doctor = f"hello. {doctor} for more information consult an internal medicine physician online -->"
                title = f"Q. {dice.choice(asked)}"
                recent = [*recent[-999:], (title, patient, doctor)]
            writer.writerow([title, patient, doctor])


def prepare(rows: Path, cache: Path, script: Path) -> tuple[float, list[int], float]:
    """Prepare in a process of its own. Returns seconds, the funnel, and the peak memory of it and its workers in GB."""
    words = [sys.executable, str(script), "data=ai_medical_chatbot", f"data.path='{rows}'"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "MEDTUNE_CACHE": str(cache)}
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.05)
    assert process.stdout
    seconds, *funnel = process.stdout.read().split()
    return float(seconds), [int(n) for n in funnel], peak / 1e9


def memory(pid: int) -> int:
    """Memory of a process and its children in bytes, without files mapped into it, which the system drops at need."""
    import psutil

    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(info.rss - info.shared for info in (process.memory_info() for process in family))
    except psutil.Error:
        return 0


def main() -> None:
    """Time the first and the second preparation, and one tenth of the rows for the ratio of speeds."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "prepare.py"
        script.write_text(PREPARE)
        tenth, rows = Path(folder) / "tenth.csv", Path(folder) / "rows.csv"
        write_rows(tenth, ROWS // 10)
        write_rows(rows, ROWS)
        print(f"{ROWS:,} rows, {rows.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} processors")
        small, _, small_peak = prepare(tenth, Path(folder) / "cache-tenth", script)
        first, funnel, peak = prepare(rows, Path(folder) / "cache", script)
        second, _, _ = prepare(rows, Path(folder) / "cache", script)
        print(
            f"prepared: {first:.1f} s, {ROWS / first:,.0f} rows/s, {peak:.2f} GB; {funnel[-1]:,} kept of {funnel[0]:,}"
        )
        print(f"a tenth: {small:.1f} s, {small_peak:.2f} GB: ten times the rows take {first / small:.1f} times as long")
        print(f"from the cache: {second:.2f} s, {first / second:.0f} times as fast")


if __name__ == "__main__":
    main()
