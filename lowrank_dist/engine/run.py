"""The objects that all parts of a run share on one rank, and the progress of the run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from datetime import datetime

import torch

from lowrank_dist.backend.select import Backend
from lowrank_dist.checkpoint.training_state import TrainingState
from lowrank_dist.config import Config
from lowrank_dist.data.batches import StepBatch
from lowrank_dist.engine.agreement import require_same_inputs
from lowrank_dist.engine.datasets import Data
from lowrank_dist.engine.meter import Phases
from lowrank_dist.engine.resumable import Resumption, complete, require_same_run
from lowrank_dist.engine.resume import find_resumption, from_rank_0, started_at
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import UserError
from lowrank_dist.methods.registry import method_package
from lowrank_dist.parallel.collectives import gather_texts
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.supervision.rank import Supervision


@dataclass(frozen=True, eq=False)
class Run:
    """One run on one rank: configuration, ranks, folder, phases and the checkpoint that it resumes from.

    config: complete, with the values that an adapter or the checkpoint gives. phases: reports this rank's phase to
    supervision. resumption: the checkpoint that the run resumes from; None for a run that starts afresh. started_at:
    when the run began (`resume.started_at`).
    """

    config: Config
    topology: Topology
    backend: Backend
    folder: RunFolder
    supervision: Supervision
    phases: Phases
    resumption: Resumption | None
    started_at: datetime

    @classmethod
    def begin(
        cls, config: Config, topology: Topology, backend: Backend, folder: RunFolder, supervision: Supervision
    ) -> Run:
        """Return the run, with the checkpoint to resume from if train.resume asks for one. Collective.

        Raises UserError on every rank for a checkpoint that this run cannot resume from.
        """
        resumption = find_resumption(config, folder, topology)
        phases = Phases(supervision, backend)
        moment, whole = started_at(resumption, topology), complete(config, resumption)
        return cls(whole, topology, backend, folder, supervision, phases, resumption, moment)

    @property
    def state(self) -> TrainingState | None:
        """The state in the checkpoint that the run resumes from; None for a run that starts afresh."""
        return None if self.resumption is None else self.resumption.state

    @property
    def writes(self) -> bool:
        """True on the rank that writes files and reports to the user."""
        return self.topology.world_group.rank() == 0

    def require_same(self, data: Data) -> None:
        """Raise UserError on every rank where ranks read different files or resuming would change the result.

        Collective.
        """
        require_same_inputs(self.config, data, self.backend.device, afresh=self.resumption is None)
        if self.resumption is not None:
            require_same_run(self.config, self.resumption, data.state, data.held_out_state, data.stream_range.steps)

    def open_folder(self) -> None:
        """Lock the run folder, prepare it for this run and log in it from now on. Collective.

        A start that fails on its input before this call leaves the folder unchanged, or creates none. No rank touches
        the folder before rank 0 holds the lock, so a run that already trains there is neither changed nor marked
        FAILED. Raises UserError on every rank where one of them cannot write there, or where another run trains there.
        """
        folder, topology = self.folder, self.topology
        from_rank_0(folder.lock, topology)
        refusal = "" if self.writes else self._refusal_to_log()
        refusals = list(filter(None, gather_texts(refusal, topology.host_group, torch.device("cpu"))))
        if refusals:
            raise UserError(refusals[0])
        within = self.resumption is not None and folder.holds(self.resumption.folder)
        anew = self.config.output.overwrite and not within
        from_rank_0(lambda: folder.begin(self.config.to_yaml(), anew=anew), topology)
        self.supervision.record_failures_in(folder.path)

    def _refusal_to_log(self) -> str:
        try:
            self.folder.log(self.topology.world_group.rank())
        except UserError as error:
            return str(error)
        return ""


def merge_line(config: Config, folder: RunFolder) -> str | None:
    """Return the line with the command that merges adapter/ into the base; None where the method has no merge."""
    try:
        method_package(config.method).files.refuse_merge(folder.adapter)
    except UserError:
        return None
    paths = {"--base": config.model.path, "--adapter": folder.adapter, "--out": folder.path / "merged"}
    options = [word for option, path in paths.items() for word in (option, str(path))]
    return f"merge it: {shlex.join(['lowrank-dist', 'merge', *options])}"


@dataclass(frozen=True)
class Progress:
    """The progress of a run. step: finished optimizer steps. Others: as in checkpoint.training_state.TrainingState."""

    step: int = 0
    updates: int = 0
    epoch: float = 0.0
    samples: int = 0
    position: int = 0
    tokens: int = 0
    target_tokens: int = 0
    loss: float | None = None

    @classmethod
    def of(cls, state: TrainingState | None, position: int) -> Progress:
        """Return the progress that a checkpoint holds, or that of a new run where `state` is None.

        position: in the stream that is read from now on (`StreamRange.position`); it may differ from the checkpoint's.
        """
        if state is None:
            return cls(position=position)
        found = {name: getattr(state, name) for name in cls.__dataclass_fields__}
        return cls(**{**found, "updates": state.updates_made, "position": position})

    def after(self, batch: StepBatch, loss: float | None) -> Progress:
        """Return the progress one step later. loss: None where the step was skipped."""
        return replace(
            self,
            step=self.step + 1,
            updates=self.updates + (loss is not None),
            epoch=batch.epoch,
            samples=self.samples + batch.samples,
            position=self.position + batch.samples,
            tokens=self.tokens + batch.global_tokens,
            target_tokens=self.target_tokens + batch.global_targets,
            loss=self.loss if loss is None else loss,
        )
