"""A sweep of five on a tiny model of which one member raises and one diverges, for tests that kill it.

Command: python tests/commands/faulty_sweep.py FOLDER WIDTH PROCESSES [OVERRIDE …]
"""

import logging
import sys
from pathlib import Path

from helpers import compose
from medtune.runtime.interruption import install_handlers
from medtune.runtime.logs import silence_libraries
from medtune.sweep.ledger import Member, open_ledger
from medtune.sweep.pipeline import Settings, run_sweep

MEMBERS = {
    "good": ["lora.r=4", "seed=1"],
    "raises": ["trainer.lr_scheduler_type=polynomial", "trainer.learning_rate=1e-8"],  # which ends above that
    "better": ["lora.r=8", "trainer.learning_rate=3e-3", "seed=2", "trainer.gradient_accumulation_steps=2"],
    "diverges": ["lora.lora_alpha=1e30", "trainer.max_grad_norm=0"],
    "best": ["lora.r=16", "lora=all_linear", "trainer.lr_scheduler_type=constant", "seed=3"],
}


def main() -> None:
    """Run what is left of the sweep."""
    folder, width, processes, *common = sys.argv[1:]
    sweep = Path(folder)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    install_handlers()
    silence_libraries()
    members = [Member(name, compose(*common, *words), sweep / name) for name, words in MEMBERS.items()]
    with open_ledger(sweep, []) as ledger:
        ledger.add_members(members)
        run_sweep(members, ledger, Settings(int(width), int(processes), None))


if __name__ == "__main__":
    main()
