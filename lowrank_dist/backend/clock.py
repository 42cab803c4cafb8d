"""Moments on the device's own time line, and what a rank spends waiting for its peers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

Mark: TypeAlias = Any


class Clock:
    """Marks cost no synchronisation: on CUDA they are events in the current stream, read when it is past them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Mark, second: Mark) -> float:
        """Between two marks. On CUDA the device must have reached the second (`Backend.synchronize`)."""
        return first.elapsed_time(second) / 1000 if self._cuda else second - first


class Waits:
    """Pairs of marks around every wait for a tensor-parallel collective, while `clock` is set.

    One for the process: the waits are deep inside autograd functions, ours and Megatron's, which know nothing of who
    trains. Without a clock a wait costs one comparison.
    """

    def __init__(self) -> None:
        self.clock: Clock | None = None
        self._marks: list[tuple[Mark, Mark]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        if self.clock is None:
            yield
            return
        begin = self.clock.mark()
        yield
        self._marks.append((begin, self.clock.mark()))

    def take(self) -> float:
        """Seconds waited since the last call; synchronise first."""
        marks, self._marks = self._marks, []
        return sum(self.clock.seconds(*pair) for pair in marks) if self.clock is not None else 0.0


WAITS = Waits()
