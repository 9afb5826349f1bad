"""Train one adapter: data -> tokenizer -> base -> adapter -> trainer -> result folder.

python -m medtune.train                     one run on the embedded default
python -m medtune.train lora.r=16,32 -m     a sweep
"""

from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from medtune.config.command_line import run_command
from medtune.config.schema import RunConfig
from medtune.config.validation import build_config
from medtune.runtime.progress import Progress
from medtune.sweep.other_launchers import report_external_sweep
from medtune.training.pipeline import Membership, train


def train_member(cfg: DictConfig) -> float:
    """Hydra's task: one run, or one member of a sweep."""
    run = build_config(cfg, RunConfig)
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    with Progress([run.name]) as progress:
        eval_loss = train(run, out, Membership(on_progress=partial(progress.update, run.name)))
    if hydra.mode is RunMode.RUN:
        from medtune.results.tables import print_summary

        print_summary([out])
    return eval_loss


def main() -> None:
    """Entry point of `python -m medtune.train` and `medtune-train`."""
    run_command(train_member, "train", conclusion=report_external_sweep)


if __name__ == "__main__":
    main()
