"""Checkpoints of a run on disk, on rank 0: write them, link last and best, remove old ones, publish one as adapter/."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from lowrank_dist.checkpoint.folder import copy_adapter, step_folders, write_checkpoint
from lowrank_dist.checkpoint.training_state import DataState, TrainingState
from lowrank_dist.engine.evaluator import best_first, label
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import DiskError, UserError
from lowrank_dist.formats.atomic import UNSUPPORTED, temporary_name
from lowrank_dist.formats.manifest import MANIFEST_FILE
from lowrank_dist.formats.paths import resolve_link
from lowrank_dist.formats.provenance import Provenance, read_provenance
from lowrank_dist.formats.text_files import TextFiles
from lowrank_dist.methods.method import Method
from lowrank_dist.untrusted.files import LINKS

logger = logging.getLogger(__name__)


class FollowingWriteError(DiskError):
    """The checkpoint of a save is complete; the disk refused what is written after it."""


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
    """Number of checkpoints to keep: the `last` newest (None: all) and the `best` best ones by the value named `by`.

    publish: "best" copies adapter/ from the best step that was evaluated and saved, "last" from the last step.
    """

    last: int | None
    best: int
    by: str
    publish: Literal["best", "last"] = "best"


class CheckpointWriter:
    """Writes checkpoints to the disk on one rank, from a stream of unsharded tensors.

    shapes: stored name → shape of the tensors of Θ. resumed: the state that the run resumes from. `write` sets two
    texts: summary, on the steps of checkpoints/last and best; remarks, on links that could not be moved and old
    checkpoints that could not be removed.
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
        self.summary = self.remarks = ""
        self._published: int | None = None

    def write(self, stream: Iterable[Mapping[str, Tensor]], state: TrainingState, *, final: bool) -> None:
        """Write checkpoints/step-N from the tensors that `Gathering.stream` yields; with `final` also adapter/.

        If there was a complete checkpoint, a kill at any point leaves one. Raises DiskError where the disk refuses,
        FollowingWriteError where it does so after the checkpoint is complete, and UserError for tensors that are
        untrained or not finite.
        """
        target = self._step_folder(state.step)
        try:
            self._write_checkpoint(target, stream, state)
        except OSError as error:
            raise DiskError(f"{self._folder.checkpoints}: could not be written ({error})") from error
        try:
            self._finish(target, state, final)
        except (OSError, DiskError) as error:
            raise FollowingWriteError(f"{target} is complete, but {error}") from error

    def _write_checkpoint(self, target: Path, stream: Iterable[Mapping[str, Tensor]], state: TrainingState) -> None:
        given, text = self.facts.provenance, self.facts.text
        provenance = replace(given, training={**given.training, **state.summary()})
        open_files = partial(self._method.files, provenance=provenance, trained=state.loss is not None)
        write_checkpoint(target, open_files, self._shapes, stream, state, text)

    def _finish(self, target: Path, state: TrainingState, final: bool) -> None:
        """Note the complete checkpoint `target` in the run folder; with `final` publish adapter/."""
        self._folder.saved.touch()
        self._saved = [*(step for step in self._saved if step != state.step), state.step]
        remarks = [self._folder.point("last", target)]
        values = state.evaluations.get(self._retention.by, {})
        best = [step for step in best_first(values, self._retention.by) if step in self._saved]
        # None where the run was resumed with another eval.best: the checkpoint that `best` names may be deleted below.
        remarks.append(self._folder.point("best", self._step_folder(best[0]) if best else None))
        remarks.append(self._retire(best))
        self.remarks = "; ".join(filter(None, remarks))
        if final and state.loss is None:
            raise UserError(
                f"{target}: has the initial values, because all steps were skipped (train.nonfinite=skip); lower "
                "train.lr, or look at the samples"
            )
        self.summary = f"{self._named('last', target)}: step {state.step}"
        if best:
            named = self._named("best", self._step_folder(best[0]))
            self.summary += f"; {named}: step {best[0]}, {label(self._retention.by)} {values[best[0]]:.4f}"
        if final and self._method.published:
            self.summary = f"{self._publish(state.step, best)}{self._unsaved(values)}; {self.summary}"
        logger.info("checkpoint of step %d written to %s", state.step, target)

    def published_before_last(self) -> Path | None:
        """Return the checkpoint that adapter/ was copied from; None if it is the last one or nothing was published."""
        if self._published is None or self._published == max(self._saved):
            return None
        return self._step_folder(self._published)

    def _publish(self, last: int, best: list[int]) -> str:
        """Copy adapter/ from the checkpoint that output.publish selects. Returns its description for the summary.

        best: saved steps, best first. A checkpoint that was removed or damaged, or in which nothing is trained yet, is
        passed over.
        """
        text = self.facts.text
        names = [*self._method.published, *(text.names if text else ())]
        passed_over = []
        for step in [*(best if self._retention.publish == "best" else ()), last]:
            source = self._step_folder(step)
            try:
                if step != last and _is_untrained(source):
                    raise UserError(f"{source} has the initial values")
                copy_adapter(source, self._folder.adapter, names)
            except DiskError:
                raise
            except UserError as error:
                if step == last:
                    raise
                passed_over.append(f"; step {step} is better and could not be published: {error}")
                continue
            self._published = step
            break
        assert self._published is not None, "the last step is published, or it raised"
        names_of = {"the last": last, f"the best by {label(self._retention.by)}": best[0] if best else None}
        what = " and ".join(name for name, step in names_of.items() if step == self._published)
        remedy = f"; output.publish=last takes step {last}" if self._published != last else ""
        where = f"{self._folder.adapter} is step {self._published}"
        return f"{where} (checkpoints/step-{self._published}), {what}{remedy}{''.join(passed_over)}"

    def _unsaved(self, values: Mapping[int, float]) -> str:
        """Return the note on the best evaluation, if it is of a step that this run has no checkpoint of."""
        first = next(iter(best_first(values, self._retention.by)), None)
        if first is None or first in self._saved:
            return ""
        what = "before training" if first == 0 else "not a checkpoint of this run"
        return f"; step {first}, {what}, was better: {label(self._retention.by)} {values[first]:.4f}"

    def _step_folder(self, step: int) -> Path:
        return self._folder.checkpoints / f"step-{step}"

    def _named(self, link: str, target: Path) -> str:
        """Return the name of a checkpoint in the summary: its link's, or its own where the link could not be moved."""
        moved = resolve_link(self._folder.checkpoints / link).name == target.name
        return f"checkpoints/{link}" if moved else f"checkpoints/{target.name}, the {link}"

    def _retire(self, best: list[int]) -> str:
        """Remove the checkpoints that are not kept. Returns a text on those that could not be removed."""
        if self._retention.last is None:
            return ""
        # The targets of the links stay, also of one that could not be moved, so that a link is never broken.
        linked = {resolve_link(self._folder.checkpoints / name).name for name in LINKS}
        kept = {*sorted(self._saved)[-self._retention.last :], *best[: max(1, self._retention.best)]}
        failed = []
        for step in [step for step in self._saved if step not in kept and f"step-{step}" not in linked]:
            self._saved.remove(step)
            folder = self._step_folder(step)
            try:
                _remove(folder)
            except FileNotFoundError:
                logger.info("%s: already removed by another process", folder)
            except OSError as error:  # not fatal: the new checkpoint is written
                failed.append(f"{folder}: {error}")
        return f"old checkpoints could not be removed ({'; '.join(failed)}); remove them" if failed else ""


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint. A kill leaves a temporary name or a folder without manifest, not half a checkpoint."""
    doomed = temporary_name(checkpoint)
    try:
        checkpoint.rename(doomed)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        doomed = checkpoint
        (doomed / MANIFEST_FILE).unlink()
    shutil.rmtree(doomed)


def _is_untrained(checkpoint: Path) -> bool:
    """Return whether every step of a run up to this checkpoint was skipped (train.nonfinite=skip)."""
    provenance = read_provenance(checkpoint)
    return provenance is not None and provenance.training.get("loss", 0.0) is None
