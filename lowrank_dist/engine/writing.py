"""A checkpoint onto the disk: the folder, the links that lead to it, those that it makes superfluous, the adapter."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_dist.checkpoint.adapter import Adapter, write_adapter
from lowrank_dist.checkpoint.atomic import temporary_name
from lowrank_dist.checkpoint.folder import step_folders, write_checkpoint
from lowrank_dist.checkpoint.provenance import Provenance
from lowrank_dist.checkpoint.training_state import DataState, TrainingState, tensor_name
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import DiskError
from lowrank_dist.lora.state import WholeFactor, adapter_factors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says beside numbers. `modules`: checkpoint.adapter.module_paths of the base."""

    dropout: float
    rslora: bool
    fan_in_fan_out: bool
    base: Path
    modules: Collection[str]
    provenance: Provenance
    data: DataState
    held_out: DataState | None


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `last` (None: all) and the `best` of lowest eval loss."""

    last: int | None
    best: int


class CheckpointWriter:
    """The disk's side of saving, on one rank. `facts` and the steps in `resumed`'s run are all it knows of the job."""

    def __init__(self, folder: RunFolder, facts: Facts, retention: Retention, resumed: TrainingState | None) -> None:
        self.facts, self._folder, self._retention = facts, folder, retention
        # What lies behind the step that was resumed. A newer folder did not verify, or it would have been resumed.
        self._saved = [step for step in step_folders(folder.checkpoints) if resumed and step <= resumed.step]

    def write(self, whole: Mapping[str, Mapping[str, WholeFactor]], state: TrainingState, *, final: bool) -> None:
        """Write checkpoints/step-N of masters and moments (kind → module path → factor), and with `final` adapter/ too.

        In an order in which a kill at any point leaves a complete checkpoint where there was one. Raises DiskError for
        what the disk refuses, UserError for an adapter that is untrained or not finite.
        """
        try:
            self._write(whole, state, final)
        except OSError as error:
            raise DiskError(f"could not write in {self._folder.checkpoints}: {error}") from error

    def _write(self, whole: Mapping[str, Mapping[str, WholeFactor]], state: TrainingState, final: bool) -> None:
        facts = self.facts
        factors = adapter_factors(whole["master"])
        adapter = Adapter(factors, facts.dropout, facts.rslora, facts.fan_in_fan_out, str(facts.base))
        provenance = replace(facts.provenance, training=state.summary())
        tensors = {
            tensor_name(path, side, kind): tensor
            for kind, factors in whole.items()
            for path, factor in factors.items()
            for side, tensor in (("A", factor.a), ("B", factor.b))
        }
        target = self._folder.checkpoints / f"step-{state.step}"
        write_checkpoint(target, adapter, provenance, facts.modules, tensors, state)
        self._saved = [*(step for step in self._saved if step != state.step), state.step]
        self._folder.point("last", target)
        best = self._best(state.eval_losses)
        if best:
            self._folder.point("best", self._folder.checkpoints / f"step-{best[0]}")
        self._retire(best)
        if final:
            write_adapter(self._folder.adapter, adapter, provenance, facts.modules, trained=True, replace=True)
        logger.info("checkpoint of step %d written to %s", state.step, target)

    def _best(self, eval_losses: dict[int, float]) -> list[int]:
        """The saved steps that were evaluated, lowest loss first."""
        return sorted((step for step in self._saved if step in eval_losses), key=lambda step: eval_losses[step])

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
