"""GPUs and their links by data sheet, and the shares of these rates that a step reaches."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from lowrank_dist.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    memory: bytes. flops: dense bf16 FLOP/s. bandwidth: of memory, B/s. node, network: one direction of the GPU's link
    to the others in its node, and to other nodes (its own NIC), B/s.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    node: float
    network: float


# NVIDIA's data sheets, SXM forms; one NIC a GPU: HDR (200 Gbit/s) for A100, NDR (400) from H100 on.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40 * 10**9, 312e12, 1.555e12, 300e9, 25e9),
        Gpu("a100", 80 * 10**9, 312e12, 2.039e12, 300e9, 25e9),
        Gpu("l40s", 48 * 10**9, 362e12, 0.864e12, 32e9, 25e9),
        Gpu("h100", 80 * 10**9, 989e12, 3.35e12, 450e9, 50e9),
        Gpu("h200", 141 * 10**9, 989e12, 4.8e12, 450e9, 50e9),
        Gpu("b200", 180 * 10**9, 2250e12, 8.0e12, 900e9, 50e9),
    )
}
# Shares of the data sheet's rates: GEMMs and memory as measured on H100 and H200 (790 to 798 TFLOP/s; 3.0 and
# 4.3 TB/s); links assumed.
GEMM_SHARE, MEMORY_SHARE, LINK_SHARE = 0.8, 0.9, 0.8
# Seconds before a collective's first byte, assumed.
NODE_LATENCY, NETWORK_LATENCY = 15e-6, 40e-6
# CUDA context, NCCL's buffers and cuBLAS workspaces; the share of the rest that the allocator cannot use. Assumed.
OUTSIDE_TENSORS, FRAGMENTATION = 2 * 10**9, 0.03

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {f"{unit[0]}IB": 2 ** (10 * power) for power, unit in enumerate(_UNITS, start=1)}


def gpu_of(name: str) -> Gpu:
    """Return the GPU of that name. Raises UserError, which lists all known GPUs, for any other name."""
    found = GPUS.get(name.lower())
    if found is None:
        # "h100-80gb" means h100, although a100-40gb is spelt more like it.
        inside = sorted((known for known in GPUS if known in name.lower()), key=len, reverse=True)
        match = inside or difflib.get_close_matches(name.lower(), GPUS, n=1)
        meant = f"did you mean {match[0]}? " if match else ""
        raise UserError(f"--gpu: {name!r} is not known: {meant}There are {', '.join(GPUS)}")
    return found


def bytes_in(text: str, option: str) -> int:
    """Return the bytes of "80GB" or "80 GiB". Raises UserError without a unit or a number above 0."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        said = "has no unit" if match is not None and not match[2] else "is not a size"
        raise UserError(f"{option}: {text!r} {said}: write a number above 0 with a unit, as in 80GB or 80GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def usable(memory: int) -> int:
    """Return the bytes of a GPU's memory that tensors can use."""
    return int((memory - OUTSIDE_TENSORS) * (1 - FRAGMENTATION))


def gpu_called(device: str) -> Gpu | None:
    """Return the GPU that its driver calls `device` ("NVIDIA H100 80GB HBM3"); None if it is unknown."""
    words = re.findall(r"[a-z]+\d+[a-z]*", device.lower())
    return next((gpu for gpu in GPUS.values() if gpu.name in words), None)


def peak_flops(device: str) -> float | None:
    """Return dense bf16 FLOP/s of the GPU that its driver calls `device`; None if it is unknown."""
    gpu = gpu_called(device)
    return None if gpu is None else gpu.flops
