"""The training loop and its learning-rate schedule."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.data.batches import StepBatch
from lowrank_dist.engine.datasets import Data
from lowrank_dist.engine.evaluator import STOPS, Evaluator
from lowrank_dist.engine.meter import Meter
from lowrank_dist.engine.reporter import Reporter
from lowrank_dist.engine.run import Progress, Run, merge_line
from lowrank_dist.engine.saving import CheckpointSaver
from lowrank_dist.engine.zero import Engine
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.parallel.collectives import all_equal, digest, gather_texts, gather_values
from lowrank_dist.supervision.status import LEAVING

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Linear warmup over `warmup_steps`, then constant `peak` or decay to `peak · min_ratio` at `total_steps`."""

    kind: Literal["cosine", "linear", "constant"]
    peak: float
    warmup_steps: int
    total_steps: int
    min_ratio: float

    def at(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0. It is never 0 in warmup: that would train nothing."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        left = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * left)


class Trainer:
    """Maximises log p(y | x; Φ₀ + ΔΦ(Θ)) over Θ: the mean over the target tokens of a global batch."""

    def __init__(
        self,
        run: Run,
        engine: Engine,
        data: Data,
        evaluator: Evaluator,
        saver: CheckpointSaver,
        reporter: Reporter,
        meter: Meter,
    ) -> None:
        train = run.config.train
        self.run, self.engine, self.batches, self.steps = run, engine, data.train, data.stream_range.steps
        self.evaluator, self.saver, self.reporter, self.meter = evaluator, saver, reporter, meter
        self.schedule = Schedule(
            train.schedule, train.lr, train.warmup_steps, data.stream_range.steps, train.min_lr_ratio
        )
        self.progress = Progress.of(run.state, data.stream_range.position)
        self._stopping, self._skipped = False, 0

    def train(self) -> bool:
        """Train to the last step, or until eval.patience is exhausted, and leave the result in the run folder.

        Returns False where the run was told to stop before that: it has saved and can be resumed.
        """
        try:
            return self._train()
        except BaseException:
            # The cleanup below takes time, and is not the phase in which the run failed.
            self.run.phases.enter(LEAVING)
            raise
        finally:
            self.saver.close()
            self.reporter.close()

    def _train(self) -> bool:
        config, phases = self.run.config, self.run.phases
        eval_every, save_every = config.eval.every, config.output.save_every
        if config.eval.at_start and self.progress.step == 0:
            self.evaluator.evaluate(0)
        trains = not self._ended
        if self.progress.step >= self.steps:
            self.reporter.say(f"step {self.progress.step}/{self.steps}: the run has ended; nothing left to train")
        while not self._ended:
            phases.enter("checkpoint")
            self.saver.poll()
            self._step(self.progress.step)
            done = self.progress.step
            if done == self.steps or (eval_every is not None and done % eval_every == 0):
                self.evaluator.evaluate(done)
            phases.enter("checkpoint")
            if self._ended:
                break
            if self._stopping:
                self._save_and_stop()
                return False
            if save_every is not None and done % save_every == 0:
                self.saver.save(self.progress)
        if self.progress.step < self.steps:
            self._say_early(trains)
        # Saved again even if the run had ended already: it may have been killed between checkpoint and adapter.
        phases.enter("checkpoint")
        self.saver.save(self.progress, final=True)
        self.saver.finish()
        command = merge_line(config, self.run.folder)
        if command is not None:
            self.reporter.say(command)
        if config.output.probe:
            self._keep_probe(config.output.probe)
        self.reporter.say(self.meter.summary())
        return True

    def _keep_probe(self, rows: int) -> None:
        """Write the logits of what was published on a few rows. The result of training is saved by now."""
        try:
            self.saver.load_published()
        except UserError as error:
            self.reporter.say(f"NO PROBE WAS WRITTEN: {error}")
            return
        self.saver.keep_probe(*self.evaluator.probe(rows))

    def _step(self, step: int) -> None:
        """Run optimizer step `step`, counted from 0: read, agree, accumulate microbatches, update, report."""
        every = self.run.config.train.log_every
        recorded = (step + 1) % every == 0 or step + 1 == self.steps
        if recorded:
            self.meter.begin()
        self.run.phases.enter("data", step + 1)
        batch = self.batches.batch(self.progress.position)
        self.run.phases.enter("reduction")
        told = self._agree(step, batch)
        own = self.engine.accumulate(step, batch)
        # [summed loss, stop flag]: one all-reduce tells all ranks both.
        total = torch.stack((own, own.new_tensor(told)))
        dist.all_reduce(total, group=self.run.topology.dp_group)
        summed, told_ranks = total.tolist()
        loss, lr, self._stopping = summed / batch.global_targets, self.schedule.at(step), told_ranks > 0
        norm = self.engine.step(lr, poison=not math.isfinite(loss))
        self.meter.count(batch)
        if math.isfinite(norm):
            self._skipped = 0
            learned: dict[str, float] = {"loss": loss, "learning_rate": lr, "grad_norm": norm}
            logger.info("step %d: loss %.6f, gradient norm %.6f", step + 1, loss, norm)
        else:
            self._skip_or_stop(step + 1, loss, own)
            learned = {"skipped_in_a_row": self._skipped}
        self.progress = self.progress.after(batch, learned.get("loss"))
        if recorded:
            measured, lines = self.meter.end(step + 1)
            facts = {"epoch": batch.epoch, "target_tokens": batch.global_targets}
            self.reporter.record(step + 1, {**learned, **facts, **measured})
            for line in lines:
                self.reporter.say(line)

    @property
    def _ended(self) -> bool:
        """True once the last step is done or eval.patience is exhausted. Equal on all ranks, since the history is."""
        patience = self.run.config.eval.patience
        lost = patience is not None and self.evaluator.history.without_better >= patience
        return lost or self.progress.step == self.steps

    def _agree(self, step: int, batch: StepBatch) -> bool:
        """Return True where a rank of this tensor-parallel group was told to stop.

        Raises UserError where the ranks of the group read different batches: they would train on garbage unnoticed.
        One collective exchanges both.
        """
        topology, device = self.run.topology, self.run.backend.device
        tokens = digest(m.input_ids for m in batch.microbatches)
        same, told = all_equal(tokens, self.run.supervision.stop.told, topology.tp_group, device)
        if not same:
            raise UserError(
                f"step {step + 1}: ranks of one tensor-parallel group read different batches; check that all nodes "
                "have the same data.train file and tokenizer"
            )
        return told

    def _skip_or_stop(self, step: int, loss: float, own: Tensor) -> None:
        """Handle a loss or gradient that is not finite, as train.nonfinite says.

        All ranks learn of it at the same step, and none has changed Θ. own: this rank's summed loss. Raises UserError
        where the run must stop.
        """
        train, topology = self.run.config.train, self.run.topology
        bad = gather_values(float(not own.isfinite()), topology.world_group, self.run.backend.device)
        ranks = [f"rank {rank} on {topology.hosts[rank]}" for rank, found in enumerate(bad) if found]
        what = f"the loss is {loss} ({some_of(ranks)})" if ranks else "a gradient is not finite"
        if train.nonfinite == "stop":
            raise UserError(f"step {step}: {what}; {STOPS}")
        if self._skipped >= train.max_skips:
            raise UserError(
                f"step {step}: {what}, and train.max_skips ({train.max_skips}) steps in a row were skipped; {STOPS}"
            )
        self._skipped += 1
        self.reporter.say(f"step {step}: {what}; the step is skipped on every rank")

    def _save_and_stop(self) -> None:
        self.saver.save(self.progress)
        self.saver.finish()
        stop, everyone, device = self.run.supervision.stop, self.run.topology.world_group, self.run.backend.device
        since = 0.0 if stop.told_at is None else time.monotonic() - stop.told_at
        longest = max(gather_values(since, everyone, device))
        told = {rank: name for rank, name in enumerate(gather_texts(stop.by, everyone, device)) if name}
        names = [name if rank == 0 else f"{name} to rank {rank}" for rank, name in told.items()]
        self.reporter.say(
            f"stopped by {names[0]} at step {self.progress.step} of {self.steps}: "
            f"checkpoint saved {longest:.2f} s after the signal; train.resume=auto continues from it"
        )

    def _say_early(self, trained: bool) -> None:
        history, patience = self.evaluator.history, self.run.config.eval.patience
        what = "stopped early" if trained else "the run ends early"
        remedy = "" if trained else "; raise it, or set it to null, to continue"
        self.reporter.say(
            f"{what} at step {self.progress.step} of {self.steps}: {history.without_better} evaluations in a "
            f"row no better than {history.describe_best()} (eval.patience {patience}{remedy})"
        )
