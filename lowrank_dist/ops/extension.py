"""The loader of the compiled operators (csrc/), and the choice between them and plain PyTorch.

This is the only module that knows the paths of the shared objects. An operator runs the compiled implementation for its
device, or its definition in plain PyTorch.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lowrank_dist.errors import UserError

# LIBRARY holds the schemas and the CPU operators. CUDA_LIBRARY holds the CUDA operators, which need the schemas.
LIBRARY = Path(__file__).with_name("_C.abi3.so")
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.abi3.so")
INSTALL = "pip install --no-build-isolation --no-deps -e ."
_HOW = f"`{INSTALL}` in an environment with torch and a C++ compiler"
_HOW_CUDA = f"`{INSTALL}` in an environment with a CUDA build of torch, its CUDA's nvcc and a C++ compiler"

_plain = False


@cache
def reason_not_loaded() -> str | None:
    """Load the CPU operators once. Return why they are missing, or None where `torch.ops.lowrank_dist` exists."""
    return _load(LIBRARY, _HOW)


@cache
def reason_not_loaded_cuda() -> str | None:
    """Load the CUDA operators once. Return why they are missing, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build; build them with {_HOW_CUDA}"
    return reason_not_loaded() or _load(CUDA_LIBRARY, _HOW_CUDA)


def extension_loaded() -> bool:
    """Return whether the schemas and the CPU operators are loaded."""
    return reason_not_loaded() is None


def cuda_extension_loaded() -> bool:
    """Return whether the CUDA operators are loaded. Loading them starts nothing on a GPU."""
    return reason_not_loaded_cuda() is None


def require_compiled(device: str) -> None:
    """Raise UserError, with the remedy, where the compiled operators for `device` ("cpu" or "cuda") are missing."""
    reason = reason_not_loaded_on(device)
    if reason is not None:
        raise UserError(f"engine.kernels: compiled operators for {device} are required, but {reason}")


def describe(device: str) -> str:
    """Return a line that names the operators of the low-rank path on `device` ("cpu" or "cuda")."""
    reason = reason_not_loaded_on(device)
    if reason is not None:
        return f"plain PyTorch operators for {device}: {reason}"
    return f"compiled operators for {device} ({CUDA_LIBRARY.name if device == 'cuda' else cpu_capability()})"


def cpu_capability() -> str | None:
    """Return the instruction set of the CPU operators that run here, or None where they are missing."""
    return torch.ops.lowrank_dist.cpu_capability() if extension_loaded() else None


def reason_not_loaded_on(device: str) -> str | None:
    """Return why the compiled operators for `device` ("cpu" or "cuda") are missing, or None where they are loaded."""
    return {"cpu": reason_not_loaded, "cuda": reason_not_loaded_cuda}[device]()


def _load(library: Path, how: str) -> str | None:
    if not library.is_file():
        return f"{library} was not built; build it with {how}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} cannot be loaded by torch {torch.__version__} ({error}); build it again with {how}"
    return None


def use_plain(plain: bool) -> None:
    """Switch all operators to plain PyTorch, or back to the compiled ones (engine.kernels)."""
    global _plain
    _plain = plain


def compiled(tensor: Tensor) -> bool:
    """Return whether the compiled operators run on this tensor. Log once per device where they are missing."""
    return not _plain and _available(tensor.device.type)


@cache
def _available(device: str) -> bool:
    if device not in ("cpu", "cuda"):
        return False
    reason = reason_not_loaded_on(device)
    if reason is not None:
        logging.getLogger(__name__).warning("plain PyTorch is used instead of the compiled operators: %s", reason)
    return reason is None
