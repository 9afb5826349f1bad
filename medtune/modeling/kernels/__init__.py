"""Kernels in Triton, for a GPU. Triton comes with PyTorch for GPUs only: they are imported where they are used."""

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent


@cache
def kernels_available() -> bool:
    """Whether Triton can build kernels on this machine: it needs a C compiler, and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return bool(compiler and headers and importlib.util.find_spec("triton"))
