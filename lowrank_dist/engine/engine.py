"""The model, what of it is trained, and the optimiser of that: all that computes in a training step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.data.batch import Microbatch
from lowrank_dist.engine.resume import restore
from lowrank_dist.engine.run import Run
from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.parallel.theta import Theta


@dataclass(frozen=True, eq=False)
class Engine:
    """The frozen model with Θ attached, and ZeRO's AdamW over Θ alone."""

    model: CausalLM
    theta: Theta
    optimiser: ZeroOptimiser
    device: torch.device

    def accumulate(self, step: int, batch: Microbatch, scale: float, last: bool) -> Tensor:
        """Add a microbatch's gradients to those of the step, and return its summed loss, detached.

        step: from 0, for the dropout masks. scale, last: as `ZeroOptimiser.accumulate` takes them.
        """
        moved = self._on_device(batch)
        self.theta.masks.set(step, moved.dropout_rows)
        return self.optimiser.accumulate(lambda: self._loss(moved), scale, last)

    def loss(self, batch: Microbatch) -> Tensor:
        """Return the summed loss of a microbatch's target tokens."""
        return self._loss(self._on_device(batch))

    def logits(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return `input_ids` [b, s] on the device and their logits [b, s, V], every row one sample from position 0."""
        input_ids = input_ids.to(self.device, non_blocking=True)
        positions = torch.arange(input_ids.size(1), device=self.device).expand_as(input_ids)
        return input_ids, self.model.logits(input_ids, positions)

    def _loss(self, batch: Microbatch) -> Tensor:
        return self.model.loss(
            batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.segments
        )

    def _on_device(self, batch: Microbatch) -> Microbatch:
        def move(value: Any) -> Any:
            return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

        return Microbatch(**{field.name: move(getattr(batch, field.name)) for field in fields(batch)})


def build_engine(run: Run, model: CausalLM, theta: Theta) -> Engine:
    """Make the optimiser of Θ, with masters, moments and generators from the checkpoint where the run goes on from one.

    Collective.
    """
    train, engine, device = run.config.train, run.config.engine, run.backend.device
    rules = OptimiserRules(
        engine.zero_stage, engine.clip, engine.reduce_bucket, train.weight_decay, (train.beta1, train.beta2), train.eps
    )
    optimiser = ZeroOptimiser(theta.parameters, run.topology, rules, run.phases.enter)
    if run.resumption is not None:
        restore(run.resumption, theta, optimiser, run.topology, device)
    return Engine(model, theta, optimiser, device)
