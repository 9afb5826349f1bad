"""What medtune prints to be typed reads back as what it names, through the shell and Hydra's grammar."""

import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medtune.config.overrides import named_sweep, quoted
from medtune.runtime.pasting import override

# What may stand in a path. Hydra's grammar itself knows no control characters, and resolves ${…} in quotes too.
PATHS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="$\x85"), min_size=1)
MANY = settings(
    max_examples=3_000, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
PARSER = OverridesParser.create()


def typed(command: str) -> str:
    (word,) = shlex.split(command)
    return word


@MANY
@given(PATHS)
def test_any_folder_can_be_pasted(path: str) -> None:
    word = typed(override("run", path))
    parsed = PARSER.parse_override(quoted(word))
    assert parsed.key_or_group == "run" and str(parsed.value()) == path and not parsed.is_sweep_override()
    assert named_sweep(typed(override("sweep", path))) == path


@settings(MANY, max_examples=1_000)
@given(st.lists(PATHS, min_size=2, max_size=4))
def test_several_folders_can_be_pasted(paths: list[str]) -> None:
    parsed = PARSER.parse_override(quoted(typed(override("run", *paths))))
    assert [str(value) for value in parsed.value()] == paths and not parsed.is_sweep_override()


def test_what_needs_no_quotes_has_none() -> None:
    assert override("run", "multirun/medtune/TIME/lora.r=16") == "run=multirun/medtune/TIME/lora.r=16"
    assert override("run", "a", "b/c") == "'run=[a,b/c]'"
    assert override("run", "my runs/lora.r=4,seed=1") == "'run=\"my runs/lora.r=4,seed=1\"'"
