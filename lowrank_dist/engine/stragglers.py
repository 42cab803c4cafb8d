"""Ranks that all others wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

# A rank is slow when it was over this many records; one slow step is the machine's affair.
WINDOW = 3


class Stragglers:
    """Compares what every rank needed for its own work, without what it waited for others."""

    def __init__(self, factor: float, hosts: Sequence[str]) -> None:
        """factor: over the median of all ranks."""
        self._factor, self._hosts = factor, hosts
        self._recent: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._named: set[int] = set()

    def observe(self, step: int, seconds: Sequence[float]) -> list[str]:
        """Own seconds of every rank for one record. Returns a line for each new straggler, and each that caught up."""
        self._recent.append(seconds)
        if len(self._recent) < WINDOW:
            return []
        usual = [median(values) for values in zip(*self._recent, strict=True)]
        middle = median(usual)
        slow = {rank for rank, own in enumerate(usual) if own > self._factor * middle}
        lines = [
            f"step {step}: rank {rank} on {self._hosts[rank]} is a straggler: {usual[rank]:.3f} s of its own work "
            f"where the median rank needs {middle:.3f} s; all others wait for it"
            for rank in sorted(slow - self._named)
        ]
        caught_up = sorted(self._named - slow)
        lines += [f"step {step}: rank {rank} on {self._hosts[rank]} has caught up" for rank in caught_up]
        self._named = slow
        return lines
