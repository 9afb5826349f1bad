"""Help and reference page name every key and every option, and fit the screen."""

import subprocess
import sys
from pathlib import Path

import pytest

from medtune.config import reference
from medtune.config.groups import group_names, group_options
from medtune.config.keys import all_keys, dataclass_of, find_key, mapping_value_type

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "configuration.md"


def leaf_keys(schema: type) -> list[str]:
    """Keys that hold a value, not a group."""
    kinds = {name: find_key(name, schema)[2] for name in all_keys(schema)}
    return [name for name, kind in kinds.items() if not dataclass_of(kind) and not mapping_value_type(kind)]


@pytest.mark.parametrize("command", reference.COMMANDS)
def test_help_names_every_key_with_its_default_and_fits_80_columns(command: str) -> None:
    lines = reference.help_text(command).splitlines()
    assert max(map(len, lines)) <= 80
    shown = {line.strip().partition("=")[0] for line in lines if line.startswith("  ") and line[2] != " "}
    keys = leaf_keys(reference.COMMANDS[command])
    assert len(keys) > 80 and set(keys) <= shown


def test_help_shows_meaning_range_unit_and_choices() -> None:
    text = " ".join(reference.help_text("train").split())
    assert "lora.r=16 rank of the update [a whole number, at least 1 (rank)]" in text
    assert "trainer.warmup_ratio=0.1" in text and "[a number, at least 0 and below 1 (share)]" in text
    assert "wandb.mode=offline" in text and "[one of offline, online, disabled]" in text
    assert "lora.lora_alpha=32.0" in text, "a computed default is shown as its value"


def test_help_names_every_option_of_every_group() -> None:
    text = reference.help_text("train")
    for group in group_names():
        line = text[text.index(f"\n  {group} ") :]
        assert all(option in line for option in group_options(group))
    assert "nf4*" in text and "consultations*" in text


def test_the_reference_page_is_what_is_generated() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.markdown(), (
        "run: python -m medtune.config.reference > docs/reference/configuration.md"
    )


def test_help_is_printed_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['medtune.train', '--help']\n"
        "from medtune.train import main\n"
        "main()\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'a help page waits for torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "trainer.learning_rate=" in done.stdout, done.stderr
