"""Look at the data of a run before anything trains.

Command: python -m medtune.prepare data=local data.path=conversations.jsonl
"""

import shutil
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from medtune.config.command_line import run_command
from medtune.config.schema import PrepareConfig
from medtune.config.validation import build_config
from medtune.data.prepared import PreparedData, prepare
from medtune.data.store import SPLITS, write_parquet
from medtune.runtime.errors import UserError
from medtune.runtime.files import display_path, write_json
from medtune.runtime.logs import silence_libraries


def prepare_data(config: PrepareConfig, folder: Path) -> None:
    """Prepares and tokenizes the data of a run, proves its mask, and shows all of it; no weights are loaded.

    `folder` gets report.json, rejects.jsonl and lengths.png. Raises `UserError` as training would.
    """
    from medtune.data import display as show

    out = None if config.out is None else require_empty(config.out)
    conversations = prepare(config.data)
    shutil.copyfile(conversations.rejects, folder / "rejects.jsonl")
    show.report(conversations.report)
    # Importing these takes ten seconds: not before the data is known to be good.
    silence_libraries()
    from medtune.data.tokenization.dataset import tokenize
    from medtune.data.tokenization.mask_check import verify_mask
    from medtune.modeling.tokenizer import load_tokenizer
    from medtune.training.trainer import collator

    tokenizer = load_tokenizer(config.model)
    tokens = tokenize(tokenizer, conversations, config.trainer.max_length)
    tokens.record(folder / "rejects.jsonl")
    splits = [(getattr(tokens, name), getattr(conversations, name)) for name in SPLITS]
    proof = verify_mask(tokenizer, collator(tokenizer), splits, config.model.stop_tokens)
    write_json(folder / "report.json", {**conversations.report, "mask": vars(proof)})
    show.lengths(tokens, config.trainer.max_length, config.model.hub_id, folder / "lengths.png")
    for row in tokens.train.select(range(min(config.show, len(tokens.train)))):
        show.example(tokenizer, row, conversations.train[row["place"]])
    show.line(f"mask proof passed: {proof}")
    if out is not None:
        write_out(conversations, out)
        if private := not_redistributable(conversations):
            show.line(f"{display_path(out)} is for you alone: {private} gives no licence to pass its text on")
    show.line(f"written: {', '.join(display_path(path) for path in sorted(folder.iterdir()) if path.is_file())}")


def write_out(conversations: PreparedData, folder: Path) -> None:
    """Writes each split as Parquet, and a card; the folder appears only when complete. Raises `UserError`."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        for name in SPLITS:
            write_parquet(getattr(conversations, name), unfinished / f"{name}.parquet")
        (unfinished / "README.md").write_text(card(conversations), encoding="utf-8")
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"out={folder}: {error.strerror}: choose another folder") from None


def card(conversations: PreparedData) -> str:
    """Returns what stands beside the Parquet files: columns, sources, licences."""
    sources = conversations.report["sources"]
    lines = [f"- {s['name']} ({s['from']}): {s['rows']} rows, licence: {s['license']}" for s in sources]
    if private := not_redistributable(conversations):
        lines.append(f"\nNot to be passed on, published or uploaded: {private} gives no licence to do so.")
    head = "# Conversations prepared with medtune\n\nColumns: messages, source, group, row.\n\n"
    return head + "\n".join(lines) + "\n"


def not_redistributable(conversations: PreparedData) -> str:
    """Returns the names of the sources whose licence does not let you pass their text on."""
    return ", ".join(s["name"] for s in conversations.report["sources"] if not s["redistributable"])


def require_empty(out: str) -> Path:
    """Returns the folder for the Parquet files. Raises `UserError` if something is in it."""
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out={out} is not empty, and nothing is overwritten: choose another folder")
    return folder


def run_prepare(cfg: DictConfig) -> None:
    """Is Hydra's task: composes the configuration and looks at its data."""
    prepare_data(build_config(cfg, PrepareConfig, trains=False), Path(HydraConfig.get().runtime.output_dir))


def main() -> None:
    """Entry point of `python -m medtune.prepare` and `medtune-prepare`."""
    run_command(run_prepare, "prepare", PrepareConfig)


if __name__ == "__main__":
    main()
