"""CUDA devices that torch seems to see on a machine without any, as CUDA_VISIBLE_DEVICES masks them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class FakeGpu:
    """A GPU, or a MIG slice of one. bus: of the whole GPU, 0 where torch does not tell. entry: its name in a mask."""

    uuid: str
    bus: int = 0
    name: str = "NVIDIA H100 80GB HBM3"
    memory: int = 80 * GIB
    entry: str = ""


def node(count: int, first: int = 0) -> list[FakeGpu]:
    """Return the GPUs of a node with UUIDs of their own."""
    return [FakeGpu(f"5f2d{n:04x}-2b5e", 16 + n) for n in range(first, first + count)]


def slices(count: int, uuid: str = "5f2d0000-2b5e") -> list[FakeGpu]:
    """Return the MIG slices of one GPU, which the driver reports under the UUID of the GPU."""
    name = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    return [FakeGpu(uuid, 16, name, 10 * GIB, f"MIG-{n}c8e") for n in range(count)]


def install(patch: Callable[[Any, str, Any], None], gpus: Sequence[FakeGpu]) -> None:
    """Make torch.cuda show those of a node's GPUs that CUDA_VISIBLE_DEVICES lists. patch: as `setattr`."""
    import torch

    def visible() -> list[FakeGpu]:
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        if mask is None:
            return [gpu for gpu in gpus if not gpu.entry] or list(gpus[:1])
        named = {gpu.entry or str(number): gpu for number, gpu in enumerate(gpus)}
        return [named[entry] for entry in mask.split(",") if entry in named]

    def properties(device: Any) -> SimpleNamespace:
        gpu = visible()[getattr(device, "index", device)]
        address = {"pci_domain_id": 0, "pci_bus_id": gpu.bus, "pci_device_id": 0}
        return SimpleNamespace(uuid=gpu.uuid, name=gpu.name, total_memory=gpu.memory, **address)

    patch(torch.cuda, "is_available", lambda: bool(visible()))
    patch(torch.cuda, "device_count", lambda: len(visible()))
    patch(torch.cuda, "get_device_properties", properties)
    patch(torch.cuda, "set_device", lambda device: properties(device))
