"""Train one adapter: data -> tokenizer -> base -> adapter -> trainer -> result folder.

python -m medtune.train                     one run on the embedded default
python -m medtune.train lora.r=16,32 -m     a sweep
"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from medtune.config.command_line import command
from medtune.config.schema import Run
from medtune.config.validation import typed
from medtune.runtime.progress import Progress
from medtune.sweep.other_launchers import concluded
from medtune.training.pipeline import train


def run_member(cfg: DictConfig) -> float:
    """Hydra's task: one run, or one member of a sweep."""
    run = typed(cfg, Run)
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    with Progress([out.name]) as progress:
        eval_loss = train(run, out, watch=lambda **values: progress.update(out.name, **values))
    if hydra.mode is RunMode.RUN:
        from medtune.results.tables import summary

        print(summary([out]), flush=True)
    return eval_loss


def main() -> None:
    """Entry point of `python -m medtune.train` and `medtune-train`."""
    command(run_member, "train", conclusion=concluded)


if __name__ == "__main__":
    main()
