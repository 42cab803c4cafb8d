"""What this machine offers to torch, for those who ask before a run (`lowrank-dist doctor`)."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist


def gpus() -> list[str]:
    """A line for each CUDA device: name, memory, architecture. RuntimeError with the reason where there is none."""
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is not a CUDA build")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        reasons = [" ".join(str(warning.message).split()) for warning in said]
        raise RuntimeError("; ".join(reasons) or f"torch {torch.__version__} sees no CUDA device")
    facts = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in facts]


def nccl() -> str | None:
    """The version of the NCCL that torch was built with, or None."""
    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))
