"""What a newcomer does first: make, and the commands of the README."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medtune.config.groups import EXTRAS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def make(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=cwd, capture_output=True, text=True)


def shell_lines() -> list[str]:
    """Every command line in the README's bash blocks, comments removed."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [shlex.join(shlex.split(line, comments=True)) for block in blocks for line in block.splitlines() if line]


def installed(word: str) -> bool:
    """Whether an engine that an override chooses is there; Ray, a third of a gigabyte, may not be."""
    group, _, choice = word.partition("=")
    plugin = f"hydra_plugins.hydra_{choice.partition('_')[0]}_{group.partition('/')[2]}"
    return word not in EXTRAS or importlib.util.find_spec(plugin) is not None


def test_every_python_command_of_the_readme_composes(tmp_path: Path) -> None:
    commands = [line for line in shell_lines() if line.startswith("python -m medtune.")]
    assert len(commands) >= 14
    (tmp_path / "conversations.jsonl").write_text("{}")
    (tmp_path / "rows.csv").write_text("a")
    for line in commands:
        module, *words = [word for word in shlex.split(line)[2:] if word != "-m" and not word.startswith("sweep=")]
        # A sweep composes one member at a time: its first.
        if not all(map(installed, words)):
            continue
        words = [word for word in words if not re.search(r"=(choice|tag|interval)\(", word)]
        words = [re.sub(r"=([^\[,]+),.*", r"=\1", word) for word in words]
        extra = [] if {"--help", "--cfg"} & set(words) else ["--cfg", "job"]
        answer = subprocess.run(
            [sys.executable, "-m", module, *words, *extra], cwd=tmp_path, capture_output=True, text=True
        )
        assert answer.returncode == 0, f"{line}\n{answer.stderr}"


def test_every_other_command_of_the_readme_exists() -> None:
    others = [line for line in shell_lines() if not line.startswith("python -m medtune.")]
    assert others == ["make sweep", "make test", "make resume", "make bench-gpu", "make prepare", "make evaluate"]
    for line in others:
        assert make("-n", *line.split()[1:]).returncode == 0
    assert ".venv/bin/python -m medtune.train lora.r=16,32 -m" in make("-n", "sweep").stdout


def test_the_mistakes_in_the_readme_are_answered_as_it_says() -> None:
    block = re.search(r"```\n\$ python -m (medtune.train .*?)\n(.*?)```", README, re.DOTALL)
    assert block
    answer = subprocess.run([sys.executable, "-m", *block[1].split()], cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (2, block[2])


def test_help_lists_every_target() -> None:
    listed = re.findall(r"^  make ([\w-]+) ", make("help").stdout, re.MULTILINE)
    assert listed == [
        "help",
        "setup",
        "data",
        "sweep",
        "resume",
        "train",
        "evaluate",
        "test",
        "lint",
        "bench",
        "bench-gpu",
        "clean",
    ]


def test_readme_tree_and_groups_are_those_on_disk() -> None:
    modules = {path.name for path in (ROOT / "medtune").glob("*.py")} - {"__init__.py"}
    assert modules == set(re.findall(r"^[├└]── (\w+\.py) ", README, re.MULTILINE))
    folders = [path for path in (ROOT / "medtune").iterdir() if (path / "__init__.py").is_file()]
    assert len(folders) == 5
    steps = {path.name for folder in folders for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert steps == set(re.findall(r"^│   [├└]── (\w+\.py) ", README, re.MULTILINE))
    for group in (path for path in (ROOT / "conf").rglob("*") if path.is_dir()):
        name = group.relative_to(ROOT / "conf").as_posix()
        row = re.search(rf"^\| `{name}` \| (.*?) \|", README, re.MULTILINE)
        assert row and set(row[1].split(", ")) == {path.stem for path in group.glob("*.yaml")}


# --- make setup -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def fake_python(folder: Path, version_ok: bool = True, venv_ok: bool = True, pip_ok: bool = True) -> str:
    """A python3 that answers the Makefile's questions; its venv's pip succeeds or fails, and counts its calls."""
    pip = f"#!/bin/sh\\necho called >> {folder}/pip-calls\\nexit {0 if pip_ok else 1}\\n"
    script = folder / "python-fake"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"  *version_info*) exit {0 if version_ok else 1};;\n"
        f"  *ensurepip*) exit {0 if venv_ok else 1};;\n"
        '  -V) echo "Python 3.9.2";;\n'
        f"  *venv*) mkdir -p .venv/bin; printf '{pip}' > .venv/bin/pip; chmod +x .venv/bin/pip;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    return f"PYTHON={script}"


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        ({"version_ok": False}, "needs Python 3.11 or later, and .* is Python 3.9.2: name a newer one"),
        ({"venv_ok": False}, "venv module is missing: on Debian and Ubuntu, apt-get install python3-venv"),
        ({"pip_ok": False}, "it cannot reach a package registry: check the network"),
    ],
)
def test_setup_says_what_is_missing(checkout: Path, trouble: dict[str, bool], line: str) -> None:
    answer = make("setup", fake_python(checkout, **trouble), cwd=checkout)
    assert answer.returncode != 0
    assert re.search(line, answer.stdout)
    assert not (checkout / ".venv" / ".complete").exists()


def test_setup_without_any_python(checkout: Path) -> None:
    answer = make("setup", "PYTHON=python-that-is-not-there", cwd=checkout)
    assert answer.returncode != 0 and "there is no python-that-is-not-there: install it" in answer.stdout


def test_setup_is_skipped_when_nothing_changed(checkout: Path) -> None:
    python = fake_python(checkout)
    calls = checkout / "pip-calls"
    assert make("setup", python, cwd=checkout).returncode == 0
    first = len(calls.read_text().splitlines())
    assert first == 2
    assert make("setup", python, cwd=checkout).returncode == 0
    assert len(calls.read_text().splitlines()) == first
    # An hour newer, not `touch`: two files written within one tick of the clock are equally old to make.
    newer = (checkout / ".venv" / ".complete").stat().st_mtime + 3600
    os.utime(checkout / "constraints.txt", (newer, newer))
    assert make("setup", python, cwd=checkout).returncode == 0
    assert len(calls.read_text().splitlines()) == 2 * first
