"""One run as one of its ranks knows it, and how far it has come."""

from __future__ import annotations

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
from lowrank_dist.engine.resume import Resumption, begun, complete, find_resumption, require_same_run, told_by_rank_0
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import UserError
from lowrank_dist.parallel.collectives import gather_texts
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.supervision.rank import Supervision


@dataclass(frozen=True, eq=False)
class Run:
    """What all parts of a run share: configuration, ranks, folder, phases and the checkpoint it goes on from.

    config: complete, with the values that an adapter or the checkpoint gives. phases: reports to supervision which
    phase this rank is in. resumption: the checkpoint that the run goes on from; None for a run that starts afresh.
    begun: when it began (`resume.begun`).
    """

    config: Config
    topology: Topology
    backend: Backend
    folder: RunFolder
    supervision: Supervision
    phases: Phases
    resumption: Resumption | None
    begun: datetime

    @classmethod
    def begin(
        cls, config: Config, topology: Topology, backend: Backend, folder: RunFolder, supervision: Supervision
    ) -> Run:
        """Find the checkpoint to go on from, if train.resume asks for one. Collective.

        Raises UserError on every rank for a checkpoint that this run cannot go on from.
        """
        resumption = find_resumption(config, folder, topology)
        phases = Phases(supervision, backend)
        moment, whole = begun(resumption, topology), complete(config, resumption)
        return cls(whole, topology, backend, folder, supervision, phases, resumption, moment)

    @property
    def state(self) -> TrainingState | None:
        """The state of the checkpoint that the run goes on from."""
        return None if self.resumption is None else self.resumption.state

    @property
    def writes(self) -> bool:
        """True on the rank that writes files and speaks to the person who watches."""
        return self.topology.world_group.rank() == 0

    def require_same(self, data: Data) -> None:
        """Raise UserError, on every rank, where not all have read the same files, or where going on from the checkpoint
        would give another result than not having stopped. Collective.
        """
        require_same_inputs(self.config, data, self.backend.device, afresh=self.resumption is None)
        if self.resumption is not None:
            require_same_run(self.config, self.resumption, data.state, data.held_out_state, data.course.steps)

    def open_folder(self) -> None:
        """Make the run folder this run's and log in it from now on. Collective.

        A start that fails for its input before this leaves the folder as it was, or makes none. Nor does any rank touch
        it before rank 0 has the lock: of another run that trains there nothing is changed, and it is not said to have
        FAILED. Raises UserError on every rank where one of them cannot write there, and where another run is there.
        """
        folder, topology = self.folder, self.topology
        told_by_rank_0(folder.lock, topology)
        refusal = "" if self.writes else self._refusal_to_log()
        refusals = list(filter(None, gather_texts(refusal, topology.host_group, torch.device("cpu"))))
        if refusals:
            raise UserError(refusals[0])
        within = self.resumption is not None and folder.holds(self.resumption.folder)
        anew = self.config.output.overwrite and not within
        told_by_rank_0(lambda: folder.begin(self.config.to_yaml(), anew=anew), topology)
        self.supervision.in_folder(folder.path)

    def _refusal_to_log(self) -> str:
        try:
            self.folder.log(self.topology.world_group.rank())
        except UserError as error:
            return str(error)
        return ""


@dataclass(frozen=True)
class Progress:
    """How far a run has come: `step` optimizer steps; the rest as in checkpoint.training_state.TrainingState."""

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
        """Return the progress of a checkpoint, or of a run that begins where there is none.

        position: in the stream that is read from now on (`Course.position`), which may not be the checkpoint's.
        """
        if state is None:
            return cls(position=position)
        found = {name: getattr(state, name) for name in cls.__dataclass_fields__}
        return cls(**{**found, "updates": state.updates_made, "position": position})

    def after(self, batch: StepBatch, loss: float | None) -> Progress:
        """One step later. loss: None where it was skipped."""
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
