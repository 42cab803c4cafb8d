"""A checkpoint onto the disk: the folder, the links that lead to it, those that it makes superfluous, the adapter."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from lowrank_dist.checkpoint.folder import step_folders, write_checkpoint
from lowrank_dist.checkpoint.training_state import DataState, TrainingState
from lowrank_dist.engine.history import best_first, label
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import DiskError
from lowrank_dist.formats.atomic import temporary_name
from lowrank_dist.formats.provenance import Provenance
from lowrank_dist.formats.trained_files import copy_adapter
from lowrank_dist.methods.method import Method

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says beside numbers."""

    provenance: Provenance
    data: DataState
    held_out: DataState | None


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `last` (None: all) and the `best` by the values named `by` (`best_first`)."""

    last: int | None
    best: int
    by: str


class CheckpointWriter:
    """The disk's side of saving, on one rank. `facts` and the steps in `resumed`'s run are all it knows of the job.

    shapes: stored name → shape of the tensors of Θ. summary: which step lies where since the last `write`, in words.
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
        # What lies behind the step that was resumed. A newer folder did not verify, or it would have been resumed.
        self._saved = [step for step in step_folders(folder.checkpoints) if resumed and step <= resumed.step]
        self.summary = ""

    def write(self, stream: Iterable[Mapping[str, Tensor]], state: TrainingState, *, final: bool) -> None:
        """Write checkpoints/step-N of the tensors that `Gathering.stream` gives, and with `final` adapter/ too.

        In an order in which a kill at any point leaves a complete checkpoint where there was one. Raises DiskError for
        what the disk refuses, UserError for what is untrained or not finite.
        """
        try:
            self._write(stream, state, final)
        except OSError as error:
            raise DiskError(f"could not write in {self._folder.checkpoints}: {error}") from error

    def _write(self, stream: Iterable[Mapping[str, Tensor]], state: TrainingState, final: bool) -> None:
        provenance = replace(self.facts.provenance, training=state.summary())
        target = self._folder.checkpoints / f"step-{state.step}"
        write_checkpoint(target, partial(self._method.files, provenance=provenance), self._shapes, stream, state)
        self._saved = [*(step for step in self._saved if step != state.step), state.step]
        self._folder.point("last", target)
        values = state.evaluations.get(self._retention.by, {})
        best = [step for step in best_first(values, self._retention.by) if step in self._saved]
        if best:
            self._folder.point("best", self._folder.checkpoints / f"step-{best[0]}")
        else:
            # A run that goes on by another measure: what was the best by the former one may be retired.
            (self._folder.checkpoints / "best").unlink(missing_ok=True)
        self._retire(best)
        if final and self._method.published:
            copy_adapter(target, self._folder.adapter, self._method.published)
        logger.info("checkpoint of step %d written to %s", state.step, target)
        adapter = "adapter/ and " if final and self._method.published else ""
        self.summary = f"{adapter}checkpoints/last: step {state.step}"
        if best:
            self.summary += f"; checkpoints/best: step {best[0]}, {label(self._retention.by)} {values[best[0]]:.4f}"

    def _retire(self, best: list[int]) -> None:
        if self._retention.last is None:
            return
        # The one that `best` points to stays, whatever keep_best says: a link to nothing helps nobody.
        kept = {*sorted(self._saved)[-self._retention.last :], *best[: max(1, self._retention.best)]}
        for step in [step for step in self._saved if step not in kept]:
            folder = self._folder.checkpoints / f"step-{step}"
            doomed = temporary_name(folder)
            folder.rename(doomed)  # so that a kill leaves what is known as unfinished, not half a checkpoint
            shutil.rmtree(doomed)
            self._saved.remove(step)
