"""Finds and loads the compiled operators (csrc/). The only module that knows where the shared objects lie."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from lowrank_dist.errors import UserError

# The schemas and the CPU operators; the CUDA operators, which need the schemas.
LIBRARY = Path(__file__).with_name("_C.abi3.so")
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.abi3.so")
INSTALL = "pip install --no-build-isolation --no-deps -e ."
_HOW = f"`{INSTALL}` in an environment with torch and a C++ compiler"
_HOW_CUDA = f"`{INSTALL}` in an environment with a CUDA build of torch, its CUDA's nvcc and a C++ compiler"


@cache
def why_not() -> str | None:
    """Why the compiled operators are missing, or None where `torch.ops.lowrank_dist` is there. Loads them once."""
    return _load(LIBRARY, _HOW)


@cache
def why_not_cuda() -> str | None:
    """The same for the CUDA operators."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build; {_HOW_CUDA} builds them"
    return why_not() or _load(CUDA_LIBRARY, _HOW_CUDA)


def extension_loaded() -> bool:
    """Whether the schemas and the CPU operators are there."""
    return why_not() is None


def cuda_extension_loaded() -> bool:
    """Whether the CUDA operators are there. Loading them starts nothing on a GPU."""
    return why_not_cuda() is None


def demand(device: str) -> None:
    """UserError, with the remedy, where the compiled operators for `device` ("cpu" or "cuda") are missing."""
    reason = why_not_on(device)
    if reason is not None:
        raise UserError(f"compiled operators for {device} are demanded (engine.kernels), but {reason}")


def describe(device: str) -> str:
    """One line on what `device` ("cpu" or "cuda") computes the low-rank path with."""
    reason = why_not_on(device)
    if reason is not None:
        return f"plain PyTorch operators for {device}: {reason}"
    return f"compiled operators for {device} ({CUDA_LIBRARY.name if device == 'cuda' else cpu_capability()})"


def cpu_capability() -> str | None:
    """The instruction set whose build of the CPU operators runs, or None where they are missing."""
    return torch.ops.lowrank_dist.cpu_capability() if extension_loaded() else None


def why_not_on(device: str) -> str | None:
    """Why the compiled operators for `device` ("cpu" or "cuda") are missing, or None."""
    return {"cpu": why_not, "cuda": why_not_cuda}[device]()


def _load(library: Path, how: str) -> str | None:
    if not library.is_file():
        return f"{library} was not built; {how} builds it"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} does not load in torch {torch.__version__}: {error}; {how} builds it again"
    return None
