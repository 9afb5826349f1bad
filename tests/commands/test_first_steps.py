"""What a newcomer does first: make, and the commands of the README."""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import in_process
from medtune.config.groups import EXTRAS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def make(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=cwd, capture_output=True, text=True)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shell_lines() -> list[str]:
    """Every command line in the bash blocks of README, CONTRIBUTING and docs, comments removed, each once."""
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith("source ")]
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines))


def installed(word: str) -> bool:
    """Whether an engine that an override chooses is there; Ray, a third of a gigabyte, may not be."""
    group, _, choice = word.partition("=")
    plugin = f"hydra_plugins.hydra_{choice.partition('_')[0]}_{group.partition('/')[2]}"
    return word not in EXTRAS or importlib.util.find_spec(plugin) is not None


def test_every_python_command_of_readme_and_docs_composes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [line for line in shell_lines() if line.startswith("python -m medtune.")]
    assert len(commands) >= 30
    (tmp_path / "conversations.jsonl").write_text("{}")
    (tmp_path / "rows.csv").write_text("a")
    monkeypatch.chdir(tmp_path)
    for line in commands:
        module, *words = [word for word in shlex.split(line)[2:] if word != "-m" and not word.startswith("sweep=")]
        # A sweep composes one member at a time: its first.
        if not all(map(installed, words)):
            continue
        words = [word for word in words if not re.search(r"=(choice|tag|interval)\(", word)]
        words = [re.sub(r"=([^\[,]+),.*", r"=\1", word) for word in words]
        extra = [] if {"--help", "--cfg"} & set(words) else ["--cfg", "job"]
        answer = in_process(module, [*words, *extra], monkeypatch, capsys)
        assert answer.returncode == 0, f"{line}\n{answer.stderr}"


def test_every_other_command_of_readme_and_docs_exists() -> None:
    others = [line for line in shell_lines() if not line.startswith("python -m medtune.")]
    assert set(others) == {
        f"make {target}"
        for target in ("sweep", "test", "resume", "bench", "bench-gpu", "prepare", "evaluate", "setup", "check", "docs")
    }
    for line in others:
        assert make("-n", *line.split()[1:]).returncode == 0
    assert ".venv/bin/python -m medtune.train lora.r=16,32 -m" in make("-n", "sweep").stdout


def test_the_mistakes_in_the_readme_are_answered_as_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = re.search(r"```\n\$ python -m (medtune.train .*?)\n(.*?)```", README, re.DOTALL)
    assert block
    module, *words = block[1].split()
    answer = in_process(module, words, monkeypatch, capsys)
    assert (answer.returncode, answer.stderr) == (2, block[2])


def test_help_lists_every_target() -> None:
    listed = re.findall(r"^  make ([\w-]+) ", make("help").stdout, re.MULTILINE)
    assert listed == [
        "help", "setup", "prepare", "sweep", "resume", "train", "evaluate", "check", "test", "lint", "docs", "bench",
        "bench-gpu", "clean",
    ]  # fmt: skip


def test_the_readme_is_short_and_its_tree_is_the_one_on_disk() -> None:
    assert len(README.splitlines()) <= 180
    packages = {path.parent.name for path in (ROOT / "medtune").glob("*/__init__.py")}
    assert packages == set(re.findall(r"^[├└]── (\w+)/ ", README, re.MULTILINE))
    commands = {path.stem for path in (ROOT / "medtune").glob("*.py")} - {"__init__", "__main__"}
    assert commands == {"train", "evaluate", "prepare"} and "the commands train, evaluate and prepare" in README
    shown = set(re.findall(r"^(\w+)/ ", README, re.MULTILINE))
    assert all((ROOT / folder).is_dir() for folder in shown) and {"conf", "docs", "tests", "benchmarks"} <= shown


def test_links_in_readme_and_docs_lead_somewhere() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    local = [(page, link) for page, link in links if not link.startswith("http")]
    assert len(local) > 40
    for page, link in local:
        assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_every_page_of_the_documentation_is_in_its_navigation() -> None:
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


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


def test_benchmarks_import_what_is_there() -> None:
    found = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")  # imports in the scripts that it writes included
        found += re.findall(r"^ *from (medtune[\w.]*) import ([\w, ]+)$", text, re.MULTILINE)
    assert len(found) > 20
    for module, names in found:
        for name in (each.partition(" as ")[0] for each in names.split(", ")):
            there = importlib.import_module(module)
            assert hasattr(there, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"
