"""What benchmarks/training.py measured -> a section of BENCHMARKS.md."""

import platform
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from tabulate import tabulate
from training_cases import DEFAULT, MEDTUNE, PARTS, PLAIN, PLAIN_ROW, ROOT, TINY_MEMBERS, TINY_ONE, case_of

from medtune.results.run_folder import PACKAGES
from medtune.runtime.environment import git_commit, versions

TITLE = "Training on two CPU cores"


@dataclass
class Measurement:
    """What came of a case: seconds from the first process's start to the last one's end, and the most memory that all
    of them took together. `losses` and `eval_loss` by member; `spent`: seconds by what they went into, of one run."""

    seconds: float = 0.0
    peak_gb: float = 0.0
    error: str = ""
    losses: dict[str, list[float]] = field(default_factory=dict)
    eval_loss: dict[str, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)


class Report:
    """The measurements of all rounds, by the name of their case."""

    def __init__(self, found: dict[str, list[Measurement]], parts: Sequence[str]) -> None:
        good = {name: [m for m in results if not m.error] for name, results in found.items()}
        self.found, self.parts = found, parts
        self.good = {name: results for name, results in good.items() if results}
        self.seconds = {name: median(m.seconds for m in results) for name, results in self.good.items()}
        self.memory = {name: median(m.peak_gb for m in results) for name, results in self.good.items()}

    def text(self) -> str:
        """All of it as Markdown."""
        texts = [self.heading()]
        if "single" in self.parts:
            texts += ["### One run", self.times(PARTS["single"], PLAIN), self.where_time_goes(), self.step_losses()]
        if swept := [name for part in ("sweep", "packed") if part in self.parts for name in PARTS[part]]:
            texts += ["### A sweep of four members: r 8 and 16, learning rate 1e-4 and 3e-4"]
            texts += [self.times(swept, PLAIN_ROW), self.member_losses(swept)]
        if "overhead" in self.parts:
            texts += ["### What a member costs beside its training: a tiny random model, four steps", self.overhead()]
        if "memory" in self.parts:
            names = [name for name in PARTS["memory"] if name in self.memory]
            rows = [[name, f"{self.memory[name]:.2f}", ratio(self.memory, name, MEDTUNE)] for name in names]
            texts += ["### Peak memory of four members beside that of one", table(["", "GB", "times one run"], rows)]
        return "\n\n".join(text for text in texts if text) + "\n"

    def heading(self) -> str:
        """Machine, versions, and what was run."""
        asked = "" if list(self.parts) == list(PARTS) else f" --only {' '.join(self.parts)}"
        rounds = max(map(len, self.found.values()))
        programs = ", ".join(f"{name} {number}" for name, number in versions(PACKAGES).items())
        cases = (case_of(name, Path("FOLDER"), Path("rows.json"), "FOLDER") for name in (PLAIN, MEDTUNE, DEFAULT))
        commands = [shlex.join(["python", *case.commands[0][1:]]).replace(f"{ROOT}/", "") for case in cases]
        return f"""\
`python benchmarks/training.py --rounds {rounds}{asked}` on {date.today():%d %B %Y}, two cores of {cpu()},
{psutil.virtual_memory().total / 2**30:.0f} GiB of memory, {platform.system()}. {programs}; commit {git_commit()}.

SmolLM2-135M-Instruct in NF4 with double quantization, LoRA on every linear layer of the blocks, bfloat16, at most 256
tokens, 2 rows times 4 passes, 6 steps, then an evaluation of 40 rows. Whole processes, from start to exit: medians, and
in brackets every measurement. Ratios are of medians. The plain script is TRL at its defaults and reads ready tokens
from a file; medtune finds its own in its cache, and there too what the untuned base makes of the evaluation rows, which
its first run has kept. medtune also asks one question at each evaluation, and loads the saved adapter again to compare
it: that is in its time. Memory is the largest sum over the processes of
a case; a page that several share counts once.

```
{chr(10).join(commands)}
```"""

    def every(self, name: str) -> str:
        """Median and single measurements of a case."""
        single = ", ".join("failed" if m.error else f"{m.seconds:.1f}" for m in self.found[name])
        return f"{self.seconds[name]:.1f} ({single})" if name in self.seconds else single

    def times(self, names: Sequence[str], baseline: str) -> str:
        """Seconds and memory of some cases; how many times as fast as the baseline each is."""
        rows = []
        for name in names:
            peak = f"{self.memory[name]:.2f}" if name in self.memory else "-"
            rows.append([name, self.every(name), ratio(self.seconds, baseline, name), peak])
        return table(["", "seconds", f"times as fast as {baseline}", "peak GB"], rows)

    def where_time_goes(self) -> str:
        """Medians of the parts of one run."""
        spent = {name: self.good[name] for name in (PLAIN, MEDTUNE) if name in self.good}
        phases = list(dict.fromkeys(phase for results in spent.values() for phase in results[0].spent))
        rows = []
        for phase in sorted(phases, key="rest".__eq__):
            parts = [[m.spent[phase] for m in results if phase in m.spent] for results in spent.values()]
            rows.append([phase, *(f"{median(part):.1f}" if part else "-" for part in parts)])
        note = "medtune's import has reading and proving the data in it; its rest, checkpoints and the adapter's proof."
        return table(["seconds", *spent], rows) + "\n\n" + note

    def step_losses(self) -> str:
        """The losses of both sides, step by step."""
        if not {PLAIN, MEDTUNE} <= self.good.keys():
            return ""
        plain, ours = self.good[PLAIN][0], self.good[MEDTUNE][0]
        (member,) = plain.losses
        sides = [(*m.losses[member], m.eval_loss[member]) for m in (plain, ours)]
        labels = [*(f"step {step}" for step in range(1, len(sides[0]))), "evaluation"]
        rows = [[x, f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"] for x, a, b in zip(labels, *sides, strict=True)]
        note = "The evaluations average differently: TRL the means of batches, medtune every taught token alike."
        return table(["loss", PLAIN, MEDTUNE, "difference"], rows) + "\n\n" + note

    def member_losses(self, names: Sequence[str]) -> str:
        """For each member of the sweep its evaluation, and how far its losses are from the first case's at any step."""
        results = {name: self.good[name][0] for name in names if name in self.good}
        if not results:
            return ""
        first, rows = next(iter(results.values())), []
        for member, losses in first.losses.items():
            row = [member]
            for result in results.values():
                apart = max(abs(a - b) for a, b in zip(losses, result.losses[member], strict=True))
                row.append(f"{result.eval_loss[member]:.4f} ({apart:.4f})")
            rows.append(row)
        note = "In brackets: the largest difference of a step's training loss from that of the first column."
        return table(["eval_loss", *results], rows) + "\n\n" + note

    def overhead(self) -> str:
        """Seconds for each of the tiny members, and for each after the first."""
        rows = []
        for name in PARTS["overhead"]:
            row = [name, self.every(name), "-", "-"]
            if name in self.seconds:
                members = 1 if name == TINY_ONE else TINY_MEMBERS
                row[2] = f"{self.seconds[name] / members:.2f}"
                if members > 1 and TINY_ONE in self.seconds:
                    row[3] = f"{(self.seconds[name] - self.seconds[TINY_ONE]) / (members - 1):.2f}"
            rows.append(row)
        return table([f"one run, and {TINY_MEMBERS} members", "seconds", "a member", "each after the first"], rows)


def cpu() -> str:
    """The processor's name."""
    with suppress(OSError):
        if named := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M):
            return named[1]
    return platform.processor() or platform.machine()


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; numbers come as text."""
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def ratio(values: dict[str, float], name: str, of: str) -> str:
    """`values[name]` in times `values[of]`, if both are known."""
    return f"{values[name] / values[of]:.2f}" if name in values and of in values else "-"


def write_section(path: Path, title: str, text: str) -> None:
    """Put `text` under the heading `title` of a Markdown file, in place of what stands there."""
    whole = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    sections = re.split(r"^(?=## )", whole, flags=re.M)
    others = [section for section in sections if not section.startswith(f"## {title}\n")]
    path.write_text("\n\n".join(part.strip() for part in [*others, f"## {title}\n\n{text}"]) + "\n", encoding="utf-8")
