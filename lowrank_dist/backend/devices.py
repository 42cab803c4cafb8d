"""The devices of this machine: their properties as torch reports them, clocks, and random generators."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from lowrank_dist.backend.node import node_id

DRIVER = Path("/proc/driver/nvidia/version")
INSTALLED = Path("/proc/driver/nvidia/gpus")  # of the driver: a folder for each GPU, whatever a process may use
MASK = "CUDA_VISIBLE_DEVICES"
Mark: TypeAlias = Any


@dataclass(frozen=True)
class Gpu:
    """A CUDA device; memory in bytes, architecture as in sm_90."""

    name: str
    total: int
    free: int
    architecture: str


def gpus() -> list[Gpu]:
    """Return every CUDA device. Raises RuntimeError with the reason where there is none, or one does not answer."""
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is not a CUDA build")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        reasons = [" ".join(str(warning.message).split()) for warning in said]
        raise RuntimeError("; ".join(reasons) or f"torch {torch.__version__} sees no CUDA device")
    return [gpu(index) for index in range(torch.cuda.device_count())]


def gpu(index: int) -> Gpu:
    """Return one of the CUDA devices. Raises RuntimeError where it does not answer."""
    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(facts.name, total, free, f"sm_{facts.major}{facts.minor}")


def driver() -> str | None:
    """Return the version of NVIDIA's kernel driver, or None without one."""
    if not DRIVER.is_file():
        return None
    words = DRIVER.read_text().partition("\n")[0].split()
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 …", and with "Open" and "for" in between.
    return next((word for word in words if word.replace(".", "").isdigit()), " ".join(words))


def nccl() -> str | None:
    """Return the version of the NCCL that torch was built with, or None."""
    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def device_of_rank(requested: str, local_rank: int) -> torch.device:
    """Make a rank's device the current one, and return it. Its index counts the devices that this process sees.

    requested: "auto", "cpu" or "cuda" (the CPU where there is no CUDA device).
    """
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Card:
    """The identity of a CUDA device, the same in every process that sees it.

    unit: a GPU, or a MIG slice of one, with a memory of its own. gpu: the whole GPU; NCCL allows one rank on it.
    """

    unit: str
    gpu: str


def visible_cards() -> list[Card]:
    """Return the CUDA devices that this process sees, by index."""
    masked = [entry.strip() for entry in os.environ.get(MASK, "").split(",")]
    count = torch.cuda.device_count()
    return [_card(torch.cuda.get_device_properties(n), masked[n] if n < len(masked) else "") for n in range(count)]


def _card(facts: Any, entry: str) -> Card:
    """Return the card with torch's properties. entry: its entry in CUDA_VISIBLE_DEVICES, "" without one.

    A process that sees a MIG slice sees nothing else. Drivers differ in whether the UUID is that of the slice or of the
    whole GPU, so the entry, which names a slice by its own UUID, is taken first.
    """
    address = [getattr(facts, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    uuid, pci = str(facts.uuid), f"{node_id()} PCI {address}" if any(address) else ""
    if not uuid.strip("0-"):  # a driver that knows none
        uuid = pci or f"{node_id()} {entry}"
    if " MIG " not in facts.name:
        return Card(uuid, uuid)
    return Card(entry if entry.startswith("MIG-") else uuid, pci or f"{node_id()} MIG")


def installed_gpus() -> int:
    """Return the number of GPUs of this node by NVIDIA's kernel driver; 0 without one."""
    return len(list(INSTALLED.glob("*")))


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on `device`, so that a clock read afterwards includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """A clock whose marks cost no synchronisation: on CUDA they are events, read when the stream has passed them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Mark, second: Mark) -> float:
        """Return the seconds between two marks. On CUDA the device must have reached the second (`synchronize`)."""
        return first.elapsed_time(second) / 1000 if self._cuda else second - first


class WaitTimer:
    """Measures the waits for tensor-parallel collectives, by a pair of marks around each, while `clock` is set.

    The process has one instance (`WAIT_TIMER`), because the waits are deep inside autograd functions, ours and
    Megatron's, which have no access to the training loop. Without a clock a wait costs one comparison.
    """

    def __init__(self) -> None:
        self.clock: Clock | None = None
        self._marks: list[tuple[Mark, Mark]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        if self.clock is None:
            yield
            return
        begin = self.clock.mark()
        yield
        self._marks.append((begin, self.clock.mark()))

    def take(self) -> float:
        """Return the seconds waited since the last call; synchronise first."""
        marks, self._marks = self._marks, []
        return sum(self.clock.seconds(*pair) for pair in marks) if self.clock is not None else 0.0


WAIT_TIMER = WaitTimer()


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, and of the GPU's where there is one, as JSON.

    They are saved in checkpoints for a user's tokenizer or template that draws random numbers. Training itself draws
    from none of them: order, initial factors and dropout are functions of seed, step and name.
    """
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # a tuple, as restored below
    states: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Restore what `generator_states` returned. Raises ValueError, TypeError or KeyError for anything else."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_state(states["torch"]))
    if device.type == "cuda" and "cuda" in states:  # states saved on a CPU have none
        torch.cuda.set_rng_state(_state(states["cuda"]), device)


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
