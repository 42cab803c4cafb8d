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
from lowrank_dist.checkpoint.training_state import LOSS
from lowrank_dist.data.batch import Microbatch
from lowrank_dist.data.loader import Loader, StepBatch
from lowrank_dist.engine.history import History, Progress
from lowrank_dist.engine.meter import Meter
from lowrank_dist.engine.monitor import Monitor
from lowrank_dist.engine.phases import Phases
from lowrank_dist.engine.saving import CheckpointSaver
from lowrank_dist.engine.schedule import Schedule
from lowrank_dist.engine.zero import ZeroOptimiser
from lowrank_dist.errors import UserError
from lowrank_dist.generate.metrics import METRICS
from lowrank_dist.messages import some_of
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.parallel.agreement import all_equal, digest, every_value
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.supervision.page import LEAVING
from lowrank_dist.supervision.signals import StopRequest

logger = logging.getLogger(__name__)

# Given the model, and what to tell of the prompts of each batch that is done: names and values.
Generating = Callable[[CausalLM, Callable[[int], None]], dict[str, float]]

# What follows from a number that is not finite, and what to do.
_STOPS = "training stops on every rank. Lower train.lr, add train.warmup_steps, or look at the samples of this step"


@dataclass(frozen=True)
class Pace:
    """When things happen, in optimizer steps. None: at the end only. probe_rows: rows of the probe, 0 for none.

    patience: evaluations without a better one after which training ends early, None for never.
    """

    steps: int
    log_every: int
    eval_every: int | None
    eval_at_start: bool
    save_every: int | None
    probe_rows: int
    patience: int | None


@dataclass(frozen=True)
class NonFinite:
    """What a loss or gradient that is not finite does: stop the run, or skip up to `most_skips` steps in a row."""

    skip: bool
    most_skips: int


class Trainer:
    """Maximises log p(y | x; Φ₀ + ΔΦ(Θ)) over Θ: the mean over the target tokens of a global batch.

    evaluation: the eval set's batches. generation: decodes its prompts and scores what comes (`evaluate_generation`).
    history: what both have found so far.
    """

    def __init__(
        self,
        model: CausalLM,
        masks: MaskSource,
        optimiser: ZeroOptimiser,
        train: Loader,
        evaluation: Callable[[], Iterator[StepBatch]] | None,
        generation: Generating | None,
        history: History,
        schedule: Schedule,
        pace: Pace,
        nonfinite: NonFinite,
        monitor: Monitor,
        meter: Meter,
        saver: CheckpointSaver,
        progress: Progress,
        phases: Phases,
        stop: StopRequest,
        topology: Topology,
        backend: Backend,
    ) -> None:
        self.model, self.masks, self.optimiser = model, masks, optimiser
        self.train, self.evaluation = train, evaluation
        self.generation, self.history = generation, history
        self.schedule, self.pace, self.nonfinite = schedule, pace, nonfinite
        self.monitor, self.meter, self.saver = monitor, meter, saver
        self.progress, self.phases, self.stop = progress, phases, stop
        self.topology, self.backend = topology, backend
        self._stopping, self._skipped = False, 0

    def run(self) -> bool:
        """Train from where the run stands to the last step, or until patience is over; at the end the adapter lies in
        the run folder.

        Returns False where the run was told to stop before: it has saved, and can go on from there.
        """
        try:
            return self._run()
        except BaseException:
            self.phases.enter(LEAVING)  # what is tidied up below takes its time, and is not where the run failed
            raise
        finally:
            self.saver.close()
            self.monitor.close()

    def _run(self) -> bool:
        pace = self.pace
        if pace.eval_at_start and self.progress.step == 0:
            self._evaluate(0)
        trains = not self._ended
        while not self._ended:
            self.phases.enter("checkpoint")
            self.saver.poll()
            self._step(self.progress.step)
            done = self.progress.step
            if done == pace.steps or (pace.eval_every is not None and done % pace.eval_every == 0):
                self._evaluate(done)
            self.phases.enter("checkpoint")
            if self._ended:
                break
            if self._stopping:
                self._save_and_stop()
                return False
            if pace.save_every is not None and done % pace.save_every == 0:
                self.saver.save(self.progress)
        if self.progress.step < pace.steps:
            self._say_early(trains)
        # Again where the run had ended already: it may have been killed between the checkpoint and the adapter.
        self.phases.enter("checkpoint")
        self.saver.save(self.progress, final=True)
        self.saver.finish()
        if pace.probe_rows:
            self._probe(pace.probe_rows)
        self.monitor.say(self.meter.summary())
        return True

    @property
    def _ended(self) -> bool:
        """The same on every rank, since the history is."""
        patience = self.pace.patience
        lost = patience is not None and self.history.without_better >= patience
        return lost or self.progress.step == self.pace.steps

    def _say_early(self, trained: bool) -> None:
        what = "stopped early" if trained else "nothing is trained: the run ends early"
        remedy = "" if trained else "; raise it, or set it to null, to go on"
        self.monitor.say(
            f"{what} at step {self.progress.step} of {self.pace.steps}: {self.history.without_better} evaluations in a "
            f"row no better than {self.history.describe_best()} (eval.patience {self.pace.patience}{remedy})"
        )

    def _save_and_stop(self) -> None:
        self.saver.save(self.progress)
        self.saver.finish()
        since = 0.0 if self.stop.told_at is None else time.monotonic() - self.stop.told_at
        longest = max(every_value(since, self.topology.world_group, self.backend.device))
        self.monitor.say(
            f"stopped by {self.stop.by or 'a signal to another rank'} at step {self.progress.step} of "
            f"{self.pace.steps}: checkpoint saved {longest:.2f} s after the signal; train.resume=auto goes on from it"
        )

    def _step(self, step: int) -> None:
        recorded = (step + 1) % self.pace.log_every == 0 or step + 1 == self.pace.steps
        if recorded:
            self.meter.begin()
        self.phases.enter("data", step + 1)
        batch = self.train.step(step)
        self.phases.enter("reduction")
        told = self._agree(step, batch)
        self.model.train()
        # The summed loss, and beside it whether a rank was told to stop: all learn it without a message more.
        total = torch.tensor([0.0, told], dtype=torch.float32, device=self.backend.device)
        for index, microbatch in enumerate(batch.microbatches):
            moved = self._to_device(microbatch)
            self.masks.set(step, moved.dropout_rows)
            last = index + 1 == len(batch.microbatches)
            total[0] += self.optimiser.accumulate(lambda moved=moved: self._loss(moved), 1 / batch.global_targets, last)
        own = total[0].clone()
        dist.all_reduce(total, group=self.topology.dp_group)
        summed, told_ranks = total.tolist()
        loss, lr, self._stopping = summed / batch.global_targets, self.schedule.at(step), told_ranks > 0
        norm = self.optimiser.step(lr, spoil=not math.isfinite(loss))
        self.meter.count(batch)
        if math.isfinite(norm):
            self._skipped = 0
            learned = {"loss": loss, "learning_rate": lr, "grad_norm": norm}
            logger.info("step %d: loss %.6f, gradient norm %.6f", step + 1, loss, norm)
        else:
            self._not_finite(step + 1, loss, own)
            learned = {"skipped_in_a_row": self._skipped}
        self.progress = self.progress.after(batch, self.train.global_batch, learned.get("loss", self.progress.loss))
        if recorded:
            measured, lines = self.meter.end(step + 1)
            facts = {"epoch": batch.epoch, "target_tokens": batch.global_targets}
            self.monitor.record(step + 1, {**learned, **facts, **measured})
            for line in lines:
                self.monitor.say(line)

    def _evaluate(self, done: int) -> None:
        """Mean loss over the eval set's target tokens, and how good generated texts are."""
        if self.evaluation is None:
            return
        self.phases.enter("evaluation")
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.backend.device)
        with torch.no_grad():
            for batch in self.evaluation():
                for microbatch in batch.microbatches:
                    self.phases.enter("evaluation")
                    moved = self._to_device(microbatch)
                    total[0] += self._loss(moved)
                    total[1] += moved.target_ids.numel()
        dist.all_reduce(total, group=self.topology.dp_group)
        # Not left to each tensor-parallel rank's own arithmetic: all must end early at the same step, or none.
        dist.broadcast(total, group=self.topology.world_group, group_src=0)
        found = {LOSS: (total[0] / total[1]).item()}
        self._require_finite(found[LOSS], "eval loss", done)
        if self.generation is not None:
            self.phases.enter("evaluation")
            found |= self.generation(self.model, lambda rows: self.phases.enter("evaluation"))
        self.monitor.record(done, {f"eval_{name}": value for name, value in found.items()})
        self.history.add(done, {name: value for name, value in found.items() if name in (LOSS, *METRICS)})

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

    def _agree(self, step: int, batch: StepBatch) -> bool:
        """Whether a rank of this tensor-parallel group was told to stop.

        The same message tells ranks that see different data, which would train on garbage without a sign of it.
        """
        tokens = digest(m.input_ids for m in batch.microbatches)
        same, told = all_equal(tokens, self.stop.told, self.topology.tp_group, self.backend.device)
        if not same:
            raise UserError(
                f"step {step + 1}: ranks of one tensor-parallel group read different batches; do all nodes see the "
                "same data.train file and tokenizer?"
            )
        return told

    def _not_finite(self, step: int, loss: float, own: Tensor) -> None:
        """What `NonFinite` says. All ranks know of it at the same step, and none has changed anything."""
        bad = every_value(float(not own.isfinite()), self.topology.world_group, self.backend.device)
        ranks = [f"rank {rank} on {self.topology.hosts[rank]}" for rank, found in enumerate(bad) if found]
        what = f"the loss is {loss} ({some_of(ranks)})" if ranks else "a gradient is not finite"
        if not self.nonfinite.skip:
            raise UserError(f"step {step}: {what}; {_STOPS}")
        if self._skipped >= self.nonfinite.most_skips:
            raise UserError(
                f"step {step}: {what}, and train.max_skips ({self.nonfinite.most_skips}) steps in a row were skipped; "
                f"{_STOPS}"
            )
        self._skipped += 1
        self.monitor.say(f"step {step}: {what}; the step is skipped on every rank")

    def _require_finite(self, value: float, what: str, step: int) -> None:
        """Every rank holds the same value, so every rank stops at the same step."""
        if not math.isfinite(value):
            raise UserError(f"step {step}: the {what} is {value}; {_STOPS}")
