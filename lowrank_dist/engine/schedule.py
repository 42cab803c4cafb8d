"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warmup over `warmup_steps`, then decay from `peak` to `peak · min_ratio` at `total_steps`."""

    kind: Literal["cosine", "linear", "constant"]
    peak: float
    warmup_steps: int
    total_steps: int
    min_ratio: float

    def at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0. The first warmup step is not 0: it would train nothing."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        left = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * left)
