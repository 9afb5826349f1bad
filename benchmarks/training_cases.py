"""What benchmarks/training.py measures: the commands of every case, by its name."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

# 48 conversations of the validation split, of which the 40 that fit into 256 tokens are evaluated.
DATA = ["trainer.max_length=256", "data.validation_size=48", "data.test_size=0"]
# One answer of one token at each evaluation: medtune refuses to ask nothing at all.
ASKED = ["eval.prompts=[]", "eval.held_out=1", "eval.red_flags=0", "eval.max_new_tokens=1", "eval.final=false"]
SMALL = [*DATA, *ASKED, "lora=all_linear", "trainer.max_steps=6", "eval.every=6", "wandb=disabled"]
TINY = ["model=tiny_random", "trainer=smoke", "eval.every=4", *ASKED, "wandb=disabled"]

RANKS, RATES = (8, 16), ("1e-4", "3e-4")
GRID = ["lora.r=8,16", "trainer.learning_rate=1e-4,3e-4"]
TINY_GRID = ["lora.r=2,4,8,16", "trainer.learning_rate=1e-3,5e-4,2e-4,1e-4"]
TINY_MEMBERS = 16
SERIAL, PACKED = ["hydra.launcher.processes=1"], ["hydra.launcher.processes=1", "hydra.launcher.width=4"]

PLAIN, MEDTUNE = "plain script", "medtune.train"
PLAIN_ROW, PLAIN_PAIRS = "plain script, one after another", "plain script, two at a time, one thread each"
DEFAULT, ONE_PROCESS, TOGETHER = ("medtune.train -m", *(f"medtune.train -m {' '.join(k)}" for k in (SERIAL, PACKED)))
TINY_ONE, TINY_DEFAULT, TINY_SERIAL, TINY_PACKED = (f"tiny: {n}" for n in (MEDTUNE, DEFAULT, ONE_PROCESS, TOGETHER))
PARTS = {
    "single": [PLAIN, MEDTUNE],
    "sweep": [PLAIN_ROW, PLAIN_PAIRS, DEFAULT],
    "packed": [ONE_PROCESS, TOGETHER],
    "overhead": [TINY_ONE, TINY_DEFAULT, TINY_SERIAL, TINY_PACKED],
    "memory": [MEDTUNE, ONE_PROCESS, TOGETHER],
}


@dataclass
class Case:
    """Processes that are measured together: `commands`, `at_once` of them side by side on shared cores."""

    commands: list[list[str]]
    at_once: int = 1


def case_of(name: str, out: Path, rows: Path, model: str) -> Case:
    """The case of that name, with its results in the folder `out`.

    `rows` and `model`: the plain script's rows and the folder of its base.
    """
    one = ["lora.r=8", "trainer.learning_rate=1e-4", f"hydra.run.dir={out}"]
    script = [sys.executable, str(ROOT / "tests" / "bench" / "plain.py"), "--model", model, "--rows", str(rows)]
    four = [
        [*script, "--r", str(r), "--learning-rate", rate, "--out", str(out / f"{r}-{rate}")]
        for r in RANKS
        for rate in RATES
    ]
    cases = {
        PLAIN: Case(four[:1]),
        MEDTUNE: Case([train(*SMALL, *one)]),
        PLAIN_ROW: Case(four),
        PLAIN_PAIRS: Case(four, at_once=2),
        TINY_ONE: Case([train(*TINY, *one)]),
    }
    for launched, keys in {DEFAULT: [], ONE_PROCESS: SERIAL, TOGETHER: PACKED}.items():
        launcher = [*keys, f"hydra.sweep.dir={out}", "-m"]
        cases[launched] = Case([train(*SMALL, *GRID, *launcher)])
        cases[f"tiny: {launched}"] = Case([train(*TINY, *TINY_GRID, *launcher)])
    return cases[name]


def train(*words: str) -> list[str]:
    """A command of medtune's."""
    return [sys.executable, "-m", "medtune.train", *words]
