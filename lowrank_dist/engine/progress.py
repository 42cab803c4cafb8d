"""How far a run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lowrank_dist.checkpoint.training_state import TrainingState
from lowrank_dist.data.loader import StepBatch


@dataclass(frozen=True)
class Progress:
    """After `step` optimizer steps; the rest as in checkpoint.training_state.TrainingState."""

    step: int = 0
    epoch: float = 0.0
    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    loss: float = math.nan

    @classmethod
    def of(cls, state: TrainingState | None) -> Progress:
        """Where a checkpoint stands; the beginning without one."""
        if state is None:
            return cls()
        return cls(**{name: getattr(state, name) for name in cls.__dataclass_fields__})

    def after(self, batch: StepBatch, samples: int, loss: float) -> Progress:
        """One step of `samples` samples later."""
        return replace(
            self,
            step=self.step + 1,
            epoch=batch.epoch,
            samples=self.samples + samples,
            tokens=self.tokens + batch.global_tokens,
            target_tokens=self.target_tokens + batch.global_targets,
            loss=loss,
        )
