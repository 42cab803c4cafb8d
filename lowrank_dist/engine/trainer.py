"""The one training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.backend.select import Backend
from lowrank_dist.data.batch import Microbatch
from lowrank_dist.data.loader import Loader, StepBatch
from lowrank_dist.engine.monitor import Monitor
from lowrank_dist.engine.progress import Progress
from lowrank_dist.engine.saving import CheckpointSaver
from lowrank_dist.engine.schedule import Schedule
from lowrank_dist.engine.zero import ZeroOptimiser
from lowrank_dist.errors import UserError
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.parallel.agreement import all_equal, digest
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.topology import Topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """When things happen, in optimizer steps. None: at the end only. probe_rows: rows of the probe, 0 for none."""

    steps: int
    log_every: int
    eval_every: int | None
    eval_at_start: bool
    save_every: int | None
    probe_rows: int


class Trainer:
    """Maximises log p(y | x; Φ₀ + ΔΦ(Θ)) over Θ: the mean over the target tokens of a global batch."""

    def __init__(
        self,
        model: CausalLM,
        masks: MaskSource,
        optimiser: ZeroOptimiser,
        train: Loader,
        evaluation: Callable[[], Iterator[StepBatch]] | None,
        schedule: Schedule,
        pace: Pace,
        monitor: Monitor,
        saver: CheckpointSaver,
        progress: Progress,
        topology: Topology,
        backend: Backend,
    ) -> None:
        self.model, self.masks, self.optimiser = model, masks, optimiser
        self.train, self.evaluation = train, evaluation
        self.schedule, self.pace, self.monitor, self.saver = schedule, pace, monitor, saver
        self.progress = progress
        self.topology, self.backend = topology, backend

    def run(self) -> None:
        """Train from where the run stands to the last step; at the end the adapter lies in the run folder."""
        try:
            self._run()
        finally:
            self.saver.close()
            self.monitor.close()

    def _run(self) -> None:
        pace = self.pace
        if pace.eval_at_start and self.progress.step == 0:
            self._evaluate(0)
        for step in range(self.progress.step, pace.steps):
            self.saver.poll()
            self._step(step)
            done, last = step + 1, step + 1 == pace.steps
            if last or (pace.eval_every is not None and done % pace.eval_every == 0):
                self._evaluate(done)
            if not last and pace.save_every is not None and done % pace.save_every == 0:
                self.saver.save(self.progress)
        # Again where the run had ended already: it may have been killed between the checkpoint and the adapter.
        self.saver.save(self.progress, final=True)
        self.saver.finish()
        if pace.probe_rows:
            self._probe(pace.probe_rows)

    def _step(self, step: int) -> None:
        started = time.monotonic()
        batch = self.train.step(step)
        self._require_same_batch(step, batch)
        self.model.train()
        total = torch.zeros((), dtype=torch.float32, device=self.backend.device)
        for index, microbatch in enumerate(batch.microbatches):
            moved = self._to_device(microbatch)
            self.masks.set(step, moved.dropout_rows)
            last = index + 1 == len(batch.microbatches)
            total += self.optimiser.accumulate(lambda moved=moved: self._loss(moved), 1 / batch.global_targets, last)
        dist.all_reduce(total, group=self.topology.dp_group)
        loss, lr = total.item() / batch.global_targets, self.schedule.at(step)
        self._require_finite(loss, "loss", step + 1)
        norm = self.optimiser.step(lr)
        self._require_finite(norm, "gradient norm", step + 1)
        self.progress = self.progress.after(batch, self.train.global_batch, loss)
        if (step + 1) % self.pace.log_every == 0 or step + 1 == self.pace.steps:
            self.backend.synchronize()
            self.monitor.record(
                step + 1,
                {
                    "loss": loss,
                    "learning_rate": lr,
                    "grad_norm": norm,
                    "epoch": batch.epoch,
                    "target_tokens": batch.global_targets,
                    "tokens_per_second": batch.global_tokens / (time.monotonic() - started),
                    "memory_gib": self.backend.peak_memory_gib(),
                },
            )
        logger.info("step %d: loss %.6f, gradient norm %.6f", step + 1, loss, norm)

    def _evaluate(self, done: int) -> None:
        """Mean loss over the eval set's target tokens; the best so far is remembered by the saver."""
        if self.evaluation is None:
            return
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.backend.device)
        with torch.no_grad():
            for batch in self.evaluation():
                for microbatch in batch.microbatches:
                    moved = self._to_device(microbatch)
                    total[0] += self._loss(moved)
                    total[1] += moved.target_ids.numel()
        dist.all_reduce(total, group=self.topology.dp_group)
        loss = (total[0] / total[1]).item()
        self._require_finite(loss, "eval loss", done)
        self.monitor.record(done, {"eval_loss": loss})
        self.saver.evaluated(done, loss)

    def _probe(self, rows: int) -> None:
        """Keep the trained model's logits on a few rows, so that adapter and merge can be held against them."""
        batch = next(self.evaluation()) if self.evaluation is not None else self.train.step(0)
        self.model.eval()
        # Plain rows of tokens, packed or not: whoever compares has the tokens alone, and knows of no samples in a row.
        input_ids = self._to_device(batch.microbatches[0]).input_ids[:rows]
        positions = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
        self.saver.keep_probe(input_ids, self.model.logits(input_ids, positions))

    def _loss(self, batch: Microbatch) -> Tensor:
        return self.model.loss(
            batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.segments
        )

    def _to_device(self, batch: Microbatch) -> Microbatch:
        def move(value: Any) -> Any:
            return value.to(self.backend.device, non_blocking=True) if isinstance(value, Tensor) else value

        return Microbatch(**{field.name: move(getattr(batch, field.name)) for field in fields(batch)})

    def _require_same_batch(self, step: int, batch: StepBatch) -> None:
        """Ranks of a tensor-parallel group that see different data train on garbage without a sign of it."""
        tokens = digest(m.input_ids for m in batch.microbatches)
        if not all_equal(tokens, self.topology.tp_group, self.backend.device):
            raise UserError(
                f"step {step + 1}: ranks of one tensor-parallel group read different batches; do all nodes see the "
                "same data.train file and tokenizer?"
            )

    def _require_finite(self, value: float, what: str, step: int) -> None:
        """Every rank holds the same value, so every rank stops at the same step."""
        if not math.isfinite(value):
            raise UserError(
                f"step {step}: the {what} is {value}; training stops on every rank. Lower train.lr, add "
                "train.warmup_steps, or look at the samples of this step"
            )
