"""The devices of this machine: their properties as torch reports them, clocks, and random generators."""

from __future__ import annotations

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

DRIVER = Path("/proc/driver/nvidia/version")
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
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(facts.name, total, free, f"sm_{facts.major}{facts.minor}"))
    return found


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


def device_of_rank(requested: str, local_rank: int, local_size: int) -> tuple[torch.device, str]:
    """Make a rank's device the current one, and return it with the collective library for it ("nccl" or "gloo").

    requested: "auto", "cpu" or "cuda" (the CPU where there is no CUDA device). Where a node has more ranks than GPUs,
    ranks share GPUs and use gloo, which stages through the host, because NCCL refuses two ranks on one device.
    """
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), "gloo"
    count = torch.cuda.device_count()
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device, "nccl" if local_size <= count else "gloo"


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
