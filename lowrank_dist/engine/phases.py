"""Where a rank is, for whoever watches it, and how long it was where, for the log."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Protocol

from lowrank_dist.backend.clock import WAITS, Clock, Mark
from lowrank_dist.backend.select import Backend


class Watcher(Protocol):
    """What is told where the rank is (supervision.rank.Supervision)."""

    def enter(self, phase: str, step: int | None = None) -> None: ...


class Phases:
    """The phases of the training loop, one after the other without a gap (supervision.page.TRAINING)."""

    def __init__(self, watcher: Watcher, backend: Backend) -> None:
        self._watcher, self._clock = watcher, Clock(backend.device)
        self._marks: list[tuple[str, Mark]] = []

    def enter(self, phase: str, step: int | None = None) -> None:
        """Leave the phase before. step: the one that begins, counted from 1."""
        self._watcher.enter(phase, step)
        self._marks.append((phase, self._clock.mark()))

    def measure_waits(self, measure: bool) -> None:
        """From now on, know what is spent waiting for tensor-parallel peers."""
        WAITS.clock = self._clock if measure else None

    def take(self) -> tuple[Counter[str], float]:
        """Seconds in each phase since the last call, and how many of them were measured to be waits.

        The device must have nothing left to do (`Backend.synchronize`).
        """
        if self._marks:
            self._marks.append((self._marks[-1][0], self._clock.mark()))
        seconds: Counter[str] = Counter()
        for (phase, begin), (_, end) in pairwise(self._marks):
            seconds[phase] += self._clock.seconds(begin, end)
        self._marks = self._marks[-1:]
        return seconds, WAITS.take()
