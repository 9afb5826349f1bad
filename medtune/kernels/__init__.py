"""Kernels in Triton, for a GPU. Triton comes with PyTorch for GPUs only: they are imported where they are used."""

import importlib.util
import os
import shutil
from functools import cache


@cache
def built() -> bool:
    """Whether Triton can build kernels on this machine: it needs a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler and importlib.util.find_spec("triton"))
