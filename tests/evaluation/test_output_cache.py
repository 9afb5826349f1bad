"""The name of stored outputs changes with all code that decides a number."""

import ast
from pathlib import Path

from medtune.evaluation.output_cache import VERSIONED_MODULES

ROOT = Path(__file__).parents[2]
WATCHED = ("medtune.modeling", "medtune.data.tokenization")
WALKED = (*WATCHED, "medtune.evaluation")
# What computes outputs, and what makes the model and the tokenizer that it is given.
ENTRIES = (
    "medtune.evaluation.outputs",
    "medtune.evaluation.answers",
    "medtune.evaluation.likelihood",
    "medtune.modeling.base",
    "medtune.modeling.tokenizer",
    "medtune.modeling.lora.adapter",
)
# Modules that decide no number, or whose effect the name holds already, and why.
UNVERSIONED = {
    "medtune.data.tokenization.dataset": "its token ids and labels are in the name",
    "medtune.modeling.lora.dropout": "draws masks in training alone",
    "medtune.modeling.lora.files": "finds the adapter's files, whose bytes are in the name",
    "medtune.modeling.memory": "only refuses",
    "medtune.modeling.weights": "the fingerprint of the base is in the name",
}


def file_of(module: str) -> Path | None:
    """Returns the file of a module or package of this project; None if there is none."""
    path = ROOT / module.replace(".", "/")
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def imported_by(module: str) -> set[str]:
    """Returns the modules of this project that a module imports, at its top or inside a function."""
    file = file_of(module)
    assert file is not None
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and node.level == 0, f"{module}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("medtune.") and file_of(name)}


def reached() -> set[str]:
    """Returns all modules that computing outputs imports, transitively within the walked packages."""
    found: set[str] = set()
    waiting = list(ENTRIES)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [name for name in imported_by(module) if name.startswith(WALKED)]
    return found


def test_every_module_that_may_decide_a_number_is_in_the_name_or_known_not_to() -> None:
    versioned = {module.__name__ for module in VERSIONED_MODULES}
    assert {"medtune.evaluation.answers", "medtune.evaluation.likelihood"} <= versioned
    modules = {name for name in reached() if name.startswith(WATCHED)}
    # Packages without code of their own are left out, and kernels: the name takes every file of their folder.
    files = {name for name in modules if file_of(name).name != "__init__.py"}  # type: ignore[union-attr]
    deciding = {name for name in files if not name.startswith("medtune.modeling.kernels")}
    assert len(deciding) > len(UNVERSIONED)
    assert not versioned & UNVERSIONED.keys()
    assert deciding - versioned == UNVERSIONED.keys(), "name it in VERSIONED_MODULES, or say why it decides nothing"
