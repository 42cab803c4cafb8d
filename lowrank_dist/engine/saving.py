"""Checkpoints of a running job: the state is copied at once; a thread gathers and writes it while training goes on."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.backend.devices import generator_states
from lowrank_dist.checkpoint.folder import copy_adapter, step_folders, write_checkpoint
from lowrank_dist.checkpoint.training_state import LOSS, DataState, TrainingState
from lowrank_dist.engine.evaluator import History, best_first, label
from lowrank_dist.engine.gathering import Gathering
from lowrank_dist.engine.run import Progress, Run
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.zero import Engine
from lowrank_dist.errors import DiskError, OtherRankError, UserError
from lowrank_dist.formats.atomic import temporary_name
from lowrank_dist.formats.provenance import Provenance
from lowrank_dist.formats.safetensors_file import write_tensors
from lowrank_dist.formats.text_files import TextFiles
from lowrank_dist.generate.metrics import DEFINITION
from lowrank_dist.methods.method import Method
from lowrank_dist.supervision.peers import lost_peers

logger = logging.getLogger(__name__)

_WRITTEN, _REFUSED, _FAILED = range(3)
# Writes a checkpoint from the stream of its tensors.
_Write = Callable[[Iterable[Mapping[str, Tensor]]], None]
_LAST_SECONDS = 15  # time that a failing run waits for a checkpoint that is being written


@dataclass(frozen=True)
class Facts:
    """The facts of a job that all its checkpoints hold.

    text: the tokenizer and generation files that are saved with what is trained; None for a job without text.
    started_at: when the run began (`resume.started_at`).
    """

    provenance: Provenance
    data: DataState
    held_out: DataState | None
    text: TextFiles | None = None
    started_at: datetime | None = None


@dataclass(frozen=True)
class Retention:
    """Number of checkpoints to keep: the `last` newest (None: all) and the `best` best ones by the value named `by`."""

    last: int | None
    best: int
    by: str


class CheckpointWriter:
    """Writes checkpoints to the disk on one rank, from a stream of unsharded tensors.

    shapes: stored name → shape of the tensors of Θ. summary: text on the steps that the links point to since the last
    `write`. leftovers: text on old checkpoints that could not be removed. resumed: the state that the run resumes from.
    """

    def __init__(
        self,
        folder: RunFolder,
        method: Method,
        shapes: Mapping[str, tuple[int, ...]],
        facts: Facts,
        retention: Retention,
        resumed: TrainingState | None,
    ) -> None:
        self.facts, self._folder, self._retention = facts, folder, retention
        self._method, self._shapes = method, shapes
        # Steps up to the resumed one. A newer folder did not verify, or the run would have resumed from it.
        self._saved = [step for step in step_folders(folder.checkpoints) if resumed and step <= resumed.step]
        self.summary = self.leftovers = ""

    def write(self, stream: Iterable[Mapping[str, Tensor]], state: TrainingState, *, final: bool) -> None:
        """Write checkpoints/step-N from the tensors that `Gathering.stream` yields; with `final` also adapter/.

        If there was a complete checkpoint, a kill at any point leaves one. Raises DiskError where the disk refuses,
        UserError for tensors that are untrained or not finite.
        """
        try:
            self._write(stream, state, final)
        except OSError as error:
            raise DiskError(f"could not write in {self._folder.checkpoints}: {error}") from error

    def _write(self, stream: Iterable[Mapping[str, Tensor]], state: TrainingState, final: bool) -> None:
        given, text = self.facts.provenance, self.facts.text
        provenance = replace(given, training={**given.training, **state.summary()})
        target, trained = self._folder.checkpoints / f"step-{state.step}", state.loss is not None
        open_files = partial(self._method.files, provenance=provenance, trained=trained)
        write_checkpoint(target, open_files, self._shapes, stream, state, text)
        self._folder.saved.touch()
        self._saved = [*(step for step in self._saved if step != state.step), state.step]
        self._folder.point("last", target)
        values = state.evaluations.get(self._retention.by, {})
        best = [step for step in best_first(values, self._retention.by) if step in self._saved]
        if best:
            self._folder.point("best", self._folder.checkpoints / f"step-{best[0]}")
        else:
            # A resumed run with another eval.best: the best checkpoint by the former one may be retired.
            (self._folder.checkpoints / "best").unlink(missing_ok=True)
        self._retire(best)
        if final and not trained:
            raise UserError(
                f"{target} holds what the run began with: all of its steps were skipped (train.nonfinite=skip). Lower "
                "train.lr, or look at the samples"
            )
        if final and self._method.published:
            copy_adapter(target, self._folder.adapter, [*self._method.published, *(text.names if text else ())])
        logger.info("checkpoint of step %d written to %s", state.step, target)
        adapter = "adapter/ and " if final and self._method.published else ""
        self.summary = f"{adapter}checkpoints/last: step {state.step}"
        if best:
            self.summary += f"; checkpoints/best: step {best[0]}, {label(self._retention.by)} {values[best[0]]:.4f}"

    def _retire(self, best: list[int]) -> None:
        if self._retention.last is None:
            return
        # The target of the link `best` stays even with keep_best 0, so that the link is never broken.
        kept = {*sorted(self._saved)[-self._retention.last :], *best[: max(1, self._retention.best)]}
        failed = []
        for step in [step for step in self._saved if step not in kept]:
            self._saved.remove(step)
            folder = self._folder.checkpoints / f"step-{step}"
            doomed = temporary_name(folder)
            try:
                folder.rename(doomed)  # a kill then leaves a temporary name, not half a checkpoint
                shutil.rmtree(doomed)
            except FileNotFoundError:
                logger.info("%s is gone already: somebody removed it", folder)
            except OSError as error:  # not fatal: the new checkpoint is written
                failed.append(f"{folder}: {error}")
        self.leftovers = f"old checkpoints could not be removed ({'; '.join(failed)}): remove them" if failed else ""


@dataclass
class _Save:
    """One save under way, with its thread on this rank and the outcome there."""

    step: int
    thread: threading.Thread = field(init=False)
    outcome: int = _WRITTEN
    error: Exception | None = None


class CheckpointSaver:
    """Writes checkpoints/step-N, moves the links last and best, retires old checkpoints, and at the end adapter/.

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
        self._optimiser, self._writer, self._history, self._report = engine.optimiser, writer, history, report
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
            raise kind(f"the last checkpoint was not written: {self._refusal}")
        if self._writer is not None:
            self._report(self._writer.summary)

    def close(self) -> None:
        """Wait at most _LAST_SECONDS for a save that is still under way because the run fails. Not collective."""
        if self._current is not None:
            self._current.thread.join(_LAST_SECONDS)

    def keep_probe(self, input_ids: Tensor, logits: Tensor) -> None:
        """Write probe.safetensors: input_ids [b, s] int64 and the trained model's logits [b, s, V] fp32.

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
                self._report(f"NO PROBE WAS WRITTEN to {self._folder.probe}: {error}; is the disk full?")

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
            self._refusal = str(save.error or "rank 0 could not write it; see its log")
            message = f"step {save.step}: NO CHECKPOINT WAS WRITTEN: {self._refusal}. Training goes on"
            logger.error("%s", message)
            self._report(message)
        elif self._writer is not None and self._writer.leftovers:
            logger.warning("%s", self._writer.leftovers)
            self._report(f"step {save.step}: {self._writer.leftovers}")

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
