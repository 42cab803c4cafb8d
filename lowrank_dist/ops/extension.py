"""Finds and loads the compiled operators (csrc/). The only module that knows where the shared object lies."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")


@cache
def why_not() -> str | None:
    """Why the compiled operators are missing, or None where `torch.ops.lowrank_dist` is there. Loads them once."""
    if not LIBRARY.is_file():
        return f"{LIBRARY} was not built: with torch and a C++ compiler, run pip install --no-build-isolation again"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY} does not load in torch {torch.__version__}: {error}; build it again with this torch"
    return None


def extension_loaded() -> bool:
    """Whether the compiled operators are there."""
    return why_not() is None
