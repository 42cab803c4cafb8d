"""Checkpoints out of a running job: copied out at once, gathered and written by a thread while training goes on."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lowrank_dist.backend import rng
from lowrank_dist.backend.select import Backend
from lowrank_dist.checkpoint.training_state import LOSS, TrainingState
from lowrank_dist.engine.gathering import Gathering
from lowrank_dist.engine.history import History, Progress
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.writing import CheckpointWriter, Facts
from lowrank_dist.engine.zero import ZeroOptimiser
from lowrank_dist.errors import DiskError, ElsewhereError
from lowrank_dist.parallel.theta import Theta
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.supervision.peers import lost_peers

logger = logging.getLogger(__name__)

_WRITTEN, _NO_SPACE, _FAILED = range(3)
_LAST_SECONDS = 15  # that a run which fails waits for a checkpoint that is being written


@dataclass
class _Flight:
    """One save under way: what this rank's thread made of it."""

    step: int
    thread: threading.Thread | None = None
    outcome: int = _WRITTEN
    error: Exception | None = None


class CheckpointSaver:
    """Writes checkpoints/step-N, moves the links last and best, retires old checkpoints, and at the end adapter/.

    At most one save is under way. What the disk refuses is reported and the run goes on, to try again at the next save;
    only a run whose last save failed ends with an error. Everything else that fails ends the run on all ranks.
    """

    def __init__(
        self,
        folder: RunFolder,
        theta: Theta,
        optimiser: ZeroOptimiser,
        writer: CheckpointWriter | None,
        history: History,
        report: Callable[[str], None],
        topology: Topology,
        backend: Backend,
    ) -> None:
        """`writer`: on rank 0 of the job only. history: what evaluations found, for the state that is saved.

        report: says a line to the person who watches.
        """
        self._folder, self._optimiser, self._writer = folder, optimiser, writer
        self._topology, self._backend, self._report = topology, backend, report
        self._gathering = Gathering(theta, optimiser, topology)
        self._history = history
        self._flight: _Flight | None = None
        self._refusal: str | None = None

    def save(self, progress: Progress, *, final: bool = False) -> None:
        """Start a save, once the one before has ended. Collective."""
        self._land()
        snapshot = self._optimiser.snapshot()
        state = self._state(progress, self._writer.facts) if self._writer else None
        self._flight = flight = _Flight(progress.step)
        flight.thread = threading.Thread(target=self._fly, args=(flight, snapshot, state, final), daemon=True)
        flight.thread.start()

    def poll(self) -> None:
        """Learn whether the save under way has ended on all ranks, and how. Collective while there is one."""
        if self._flight is not None:
            self._conclude()

    def finish(self) -> None:
        """Wait for the save under way. When the last was refused: DiskError, ElsewhereError on other ranks than 0."""
        self._land()
        if self._refusal is not None:
            kind = DiskError if self._writer else ElsewhereError
            raise kind(f"the last checkpoint was not written: {self._refusal}")
        if self._writer is not None:
            self._report(self._writer.summary)

    def close(self) -> None:
        """Give the save under way of a run that fails a last chance. Not collective."""
        if self._flight is not None:
            self._flight.thread.join(_LAST_SECONDS)

    def keep_probe(self, input_ids: Tensor, logits: Tensor) -> None:
        """Write probe.safetensors: input_ids [b, s] int64 and the trained model's logits [b, s, V] fp32."""
        if self._writer is not None:
            tensors = {"input_ids": input_ids, "logits": logits.float()}
            try:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, self._folder.probe)
            except (OSError, SafetensorError) as error:
                raise DiskError(f"could not write {self._folder.probe}: {error}; is the disk full?") from error

    def _land(self) -> None:
        if self._flight is not None:
            self._flight.thread.join()
            self._conclude()

    def _conclude(self) -> None:
        """Agree on the outcome. Ranks poll at the same steps, so all see the same answer at the same step."""
        flight = self._flight
        running = flight.thread.is_alive()
        failure = None if running or flight.outcome != _FAILED else flight.error
        if failure is not None and lost_peers(failure):
            # There is nobody to agree with. Finding that out takes another timeout, and the watchdog waits for little
            # more than one.
            raise failure
        status = torch.tensor([running, 0 if running else flight.outcome], device=self._backend.device)
        try:
            dist.all_reduce(status, op=dist.ReduceOp.MAX, group=self._topology.world_group)
        except RuntimeError:
            if failure is not None:  # it says more than that the others have gone
                raise failure from None
            raise
        unfinished, outcome = status.tolist()
        if outcome == _FAILED:
            self._flight = None
            raise flight.error or ElsewhereError(f"step {flight.step}: another rank could not save; see its log")
        if unfinished:
            return
        self._flight, self._refusal = None, None
        if outcome == _NO_SPACE:
            self._refusal = str(flight.error or "rank 0 could not write it; see its log")
            message = f"step {flight.step}: NO CHECKPOINT WAS WRITTEN: {self._refusal}. Training goes on"
            logger.error("%s", message)
            self._report(message)

    def _fly(self, flight: _Flight, snapshot: Tensor, state: TrainingState | None, final: bool) -> None:
        """The thread of one save. What happened is left in `flight`, for training to find."""
        stream = self._gathering.stream(snapshot)
        try:
            try:
                if self._writer:
                    self._writer.write(stream, state, final=final)
            except DiskError as error:
                flight.outcome, flight.error = _NO_SPACE, error
            deque(stream, maxlen=0)  # after a refusal too the other ranks send what they have, and training goes on
        except Exception as error:  # whatever it is: a thread that dies of it in silence would be the worst
            flight.outcome, flight.error = _FAILED, error

    def _state(self, progress: Progress, facts: Facts) -> TrainingState:
        topology = self._topology
        values = {name: dict(steps) for name, steps in self._history.values.items()}
        return TrainingState(
            step=progress.step,
            epoch=progress.epoch,
            samples=progress.samples,
            tokens=progress.tokens,
            target_tokens=progress.target_tokens,
            loss=progress.loss,
            eval_losses=values.pop(LOSS),
            eval_metrics=values,
            data=facts.data,
            held_out=facts.held_out,
            rng=rng.capture(self._backend.device),
            config=dict(facts.provenance.config),
            base_fingerprint=facts.provenance.base_fingerprint,
            ranks={"tensor": topology.tp_size, "data": topology.dp_size},
            versions=dict(facts.provenance.versions),
        )
