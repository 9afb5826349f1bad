"""Kernels in Triton, for a GPU. Only PyTorch for GPUs brings Triton: modules here are imported where they are used."""

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


@dataclass
class MaskSeeds:
    """Seeds of a dropout mask that is never stored; each kernel regenerates it.

    `keys` (int64) and `rates` (float32, exact to 1/65,536) [members]: the key of each member's random numbers, and the
    share of elements that it drops. `layer`: a number that tells layers apart. `length`: tokens of a row.
    """

    keys: torch.Tensor
    rates: torch.Tensor
    layer: int
    length: int


@cache
def kernels_available() -> bool:
    """Returns whether Triton can build kernels on this machine: it needs a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return bool(compiler and headers and importlib.util.find_spec("triton"))
