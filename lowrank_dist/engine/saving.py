"""Checkpoints of a running job: the state is copied at once; a thread gathers and writes it while training goes on."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.backend.devices import generator_states
from lowrank_dist.checkpoint.training_state import LOSS, TrainingState, parse_state, read_state
from lowrank_dist.engine.checkpoint_writer import CheckpointWriter, Facts, FollowingWriteError
from lowrank_dist.engine.evaluator import History
from lowrank_dist.engine.gathering import Gathering
from lowrank_dist.engine.resumable import Resumption
from lowrank_dist.engine.resume import from_rank_0, restore
from lowrank_dist.engine.run import Progress, Run
from lowrank_dist.engine.zero import Engine
from lowrank_dist.errors import DiskError, OtherRankError
from lowrank_dist.formats.atomic import temporary_name
from lowrank_dist.formats.manifest import STATE_FILE
from lowrank_dist.formats.safetensors_file import write_tensors
from lowrank_dist.generate.metrics import DEFINITION
from lowrank_dist.supervision.peers import lost_peers

logger = logging.getLogger(__name__)

_WRITTEN, _REFUSED, _FAILED = range(3)
# Writes a checkpoint from the stream of its tensors.
_Write = Callable[[Iterable[Mapping[str, Tensor]]], None]
_LAST_SECONDS = 15  # time that a failing run waits for a checkpoint that is being written


@dataclass
class _Save:
    """One save under way, with its thread on this rank and the outcome there."""

    step: int
    thread: threading.Thread = field(init=False)
    outcome: int = _WRITTEN
    error: Exception | None = None


class CheckpointSaver:
    """Writes checkpoints/step-N, moves the links last and best, removes old checkpoints; at the end writes adapter/.

    At most one save is under way. A disk error is reported and the run goes on; the next save tries again. Only a disk
    error of the last save ends the run with an error. Any other failure ends the run on all ranks.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        writer: CheckpointWriter | None,
        history: History,
        report: Callable[[str], None],
    ) -> None:
        """writer: on rank 0, None elsewhere. history: the values of all evaluations, for the state that is saved.

        report: shows a line to the user.
        """
        self._folder, self._topology, self._device = run.folder, run.topology, run.backend.device
        self._theta, self._optimiser = engine.theta, engine.optimiser
        self._writer, self._history, self._report = writer, history, report
        self._gathering = Gathering(engine.theta, engine.optimiser, run.topology)
        self._current: _Save | None = None
        self._refusal: str | None = None

    def save(self, progress: Progress, *, final: bool = False) -> None:
        """Wait for the save under way, then start a new one. Collective."""
        self._wait()
        snapshot = self._optimiser.snapshot()
        write = None
        if self._writer is not None:
            state = self._state(progress, self._writer.facts)
            write = partial(self._writer.write, state=state, final=final)
        self._current = save = _Save(progress.step)
        save.thread = threading.Thread(target=self._save_in_thread, args=(save, snapshot, write), daemon=True)
        save.thread.start()

    def poll(self) -> None:
        """Report the outcome of the save under way if it has ended on all ranks. Collective while there is one."""
        if self._current is not None:
            self._conclude(self._current)

    def finish(self) -> None:
        """Wait for the save under way and report the summary. Collective while there is a save.

        If the disk refused the last save, raises DiskError on rank 0 and OtherRankError on the others.
        """
        self._wait()
        if self._refusal is not None:
            kind = DiskError if self._writer else OtherRankError
            raise kind(self._refusal)
        if self._writer is not None:
            self._report(self._writer.summary)

    def close(self) -> None:
        """End a run that fails: wait at most _LAST_SECONDS for a save that is still under way. Not collective."""
        if self._current is not None:
            self._current.thread.join(_LAST_SECONDS)

    def load_published(self) -> None:
        """Load Θ of the step that adapter/ was copied from, unless it is the last. Collective.

        Raises UserError on every rank where the step's checkpoint cannot be read.
        """

        def published() -> dict[str, Any]:
            folder = None if self._writer is None else self._writer.published_before_last()
            return {} if folder is None else {"folder": str(folder), "state": read_state(folder / STATE_FILE).to_json()}

        found = from_rank_0(published, self._topology)
        if found:
            resumption = Resumption(Path(found["folder"]), parse_state(found["state"].encode()), ())
            restore(resumption, self._theta, self._optimiser, self._topology, self._device)

    def keep_probe(self, input_ids: Tensor, logits: Tensor) -> None:
        """Write probe.safetensors: input_ids [b, s] int64 and the logits [b, s, V] fp32 of what was published.

        The result of training is saved by now, so a disk error is only reported.
        """
        if self._writer is not None:
            tensors = {"input_ids": input_ids, "logits": logits.float()}
            temporary = temporary_name(self._folder.probe)
            try:
                write_tensors(temporary, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
                temporary.replace(self._folder.probe)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                logger.error("could not write %s", self._folder.probe, exc_info=error)
                self._report(f"NO PROBE WAS WRITTEN to {self._folder.probe} ({error}); is the disk full?")

    def _wait(self) -> None:
        if self._current is not None:
            self._current.thread.join()
            self._conclude(self._current)

    def _conclude(self, save: _Save) -> None:
        """Agree on the outcome with all ranks. They poll at the same steps, so all get the answer at the same step.

        Raises where the save failed on any rank for another reason than the disk.
        """
        running = save.thread.is_alive()
        failure = None if running or save.outcome != _FAILED else save.error
        if failure is not None and lost_peers(failure):
            # The peers are gone. The all-reduce would wait for another timeout, and the watchdog waits little longer
            # than one.
            raise failure
        status = torch.tensor([running, 0 if running else save.outcome], device=self._device)
        try:
            dist.all_reduce(status, op=dist.ReduceOp.MAX, group=self._topology.world_group)
        except RuntimeError:
            if failure is not None:  # it says more than the loss of the peers does
                raise failure from None
            raise
        unfinished, outcome = status.tolist()
        if outcome == _FAILED:
            self._current = None
            raise save.error or OtherRankError(f"step {save.step}: another rank could not save; see its log")
        if unfinished:
            return
        self._current, self._refusal = None, None
        if outcome == _REFUSED:
            reason = str(save.error or "rank 0 could not write it; see its log")
            if isinstance(save.error, FollowingWriteError):
                message, self._refusal = f"step {save.step}: {reason}. Training continues", reason
            else:
                message = f"step {save.step}: NO CHECKPOINT WAS WRITTEN: {reason}. Training continues"
                self._refusal = f"the last checkpoint was not written: {reason}"
            logger.error("%s", message)
            self._report(message)
        elif self._writer is not None and self._writer.remarks:
            logger.warning("%s", self._writer.remarks)
            self._report(f"step {save.step}: {self._writer.remarks}")

    def _save_in_thread(self, save: _Save, snapshot: Tensor, write: _Write | None) -> None:
        """Gather, and on rank 0 write, in the thread of one save. The outcome is stored in `save`."""
        stream = self._gathering.stream(snapshot)
        try:
            try:
                if write is not None:
                    write(stream)
            except DiskError as error:
                save.outcome, save.error = _REFUSED, error
            deque(stream, maxlen=0)  # also after a disk error: other ranks still send their part, and training goes on
        except Exception as error:  # of any type: the thread must not die silently
            save.outcome, save.error = _FAILED, error

    def _state(self, progress: Progress, facts: Facts) -> TrainingState:
        topology = self._topology
        values = {name: dict(steps) for name, steps in self._history.values.items()}
        return TrainingState(
            step=progress.step,
            updates=progress.updates,
            epoch=progress.epoch,
            samples=progress.samples,
            position=progress.position,
            tokens=progress.tokens,
            target_tokens=progress.target_tokens,
            loss=progress.loss,
            eval_losses=values.pop(LOSS),
            eval_metrics=values,
            metric_definition=DEFINITION,
            data=facts.data,
            held_out=facts.held_out,
            rng=generator_states(self._device),
            config=dict(facts.provenance.config),
            base_fingerprint=facts.provenance.base_fingerprint,
            ranks={"tensor": topology.tp_size, "data": topology.dp_size},
            versions=dict(facts.provenance.versions),
            begun=facts.started_at,
        )
