"""What this machine offers to torch, for those who ask before a run (`lowrank-dist doctor`)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device; memory in bytes, architecture as in sm_90."""

    name: str
    total: int
    free: int
    architecture: str


def gpus() -> list[Gpu]:
    """Every CUDA device. RuntimeError with the reason where there is none, or one that does not answer."""
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is not a CUDA build")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        reasons = [" ".join(str(warning.message).split()) for warning in said]
        raise RuntimeError("; ".join(reasons) or f"torch {torch.__version__} sees no CUDA device")
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(facts.name, total, free, f"sm_{facts.major}{facts.minor}"))
    return found


def driver() -> str | None:
    """The version of NVIDIA's kernel driver, or None without one."""
    if not DRIVER.is_file():
        return None
    words = DRIVER.read_text().partition("\n")[0].split()
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 …", and with "Open" and "for" in between.
    return next((word for word in words if word.replace(".", "").isdigit()), " ".join(words))


def nccl() -> str | None:
    """The version of the NCCL that torch was built with, or None."""
    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def device_of_rank(requested: str, local_rank: int, local_size: int) -> tuple[torch.device, str]:
    """The device of a rank and the collective library that its job uses there; makes the device the current one.

    requested: "auto", "cpu" or "cuda" (where there is none, the CPU). More ranks on a node than GPUs share them over
    gloo, which stages through the host: NCCL refuses two ranks on one device.
    """
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), "gloo"
    count = torch.cuda.device_count()
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device, "nccl" if local_size <= count else "gloo"


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on `device`, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
