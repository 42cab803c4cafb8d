"""The compiled operators (csrc/): found, loaded, and chosen or not for a tensor.

The only module that knows where the shared objects lie. An operator runs the compiled implementation of its device, or
the plain PyTorch that defines it.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lowrank_dist.errors import UserError

# The schemas and the CPU operators; the CUDA operators, which need the schemas.
LIBRARY = Path(__file__).with_name("_C.abi3.so")
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.abi3.so")
INSTALL = "pip install --no-build-isolation --no-deps -e ."
_HOW = f"`{INSTALL}` in an environment with torch and a C++ compiler"
_HOW_CUDA = f"`{INSTALL}` in an environment with a CUDA build of torch, its CUDA's nvcc and a C++ compiler"

_plain = False


@cache
def why_not() -> str | None:
    """Return why the compiled operators are missing, or None where `torch.ops.lowrank_dist` is there. Loaded once."""
    return _load(LIBRARY, _HOW)


@cache
def why_not_cuda() -> str | None:
    """Return the same for the CUDA operators."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build; {_HOW_CUDA} builds them"
    return why_not() or _load(CUDA_LIBRARY, _HOW_CUDA)


def extension_loaded() -> bool:
    """Return whether the schemas and the CPU operators are there."""
    return why_not() is None


def cuda_extension_loaded() -> bool:
    """Return whether the CUDA operators are there. Loading them starts nothing on a GPU."""
    return why_not_cuda() is None


def demand(device: str) -> None:
    """Raise UserError, with the remedy, where the compiled operators for `device` ("cpu" or "cuda") are missing."""
    reason = why_not_on(device)
    if reason is not None:
        raise UserError(f"compiled operators for {device} are demanded (engine.kernels), but {reason}")


def describe(device: str) -> str:
    """Return a line on what `device` ("cpu" or "cuda") computes the low-rank path with."""
    reason = why_not_on(device)
    if reason is not None:
        return f"plain PyTorch operators for {device}: {reason}"
    return f"compiled operators for {device} ({CUDA_LIBRARY.name if device == 'cuda' else cpu_capability()})"


def cpu_capability() -> str | None:
    """Return the instruction set whose build of the CPU operators runs, or None where they are missing."""
    return torch.ops.lowrank_dist.cpu_capability() if extension_loaded() else None


def why_not_on(device: str) -> str | None:
    """Return why the compiled operators for `device` ("cpu" or "cuda") are missing, or None."""
    return {"cpu": why_not, "cuda": why_not_cuda}[device]()


def _load(library: Path, how: str) -> str | None:
    if not library.is_file():
        return f"{library} was not built; {how} builds it"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} does not load in torch {torch.__version__}: {error}; {how} builds it again"
    return None


def use_plain(plain: bool) -> None:
    """Run every operator as plain PyTorch from now on, or the compiled ones again (engine.kernels)."""
    global _plain
    _plain = plain


def compiled(tensor: Tensor) -> bool:
    """Return whether the compiled operators take this tensor. The log names a missing device once."""
    return not _plain and _available(tensor.device.type)


@cache
def _available(device: str) -> bool:
    if device not in ("cpu", "cuda"):
        return False
    reason = why_not_on(device)
    if reason is not None:
        logging.getLogger(__name__).warning("plain PyTorch runs in place of the compiled operators: %s", reason)
    return reason is None
