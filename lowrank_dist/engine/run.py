"""One run as one of its ranks knows it, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowrank_dist.backend.select import Backend
from lowrank_dist.checkpoint.training_state import TrainingState
from lowrank_dist.config import Config
from lowrank_dist.data.batches import StepBatch
from lowrank_dist.engine.agreement import require_same_inputs
from lowrank_dist.engine.datasets import Data
from lowrank_dist.engine.meter import Phases
from lowrank_dist.engine.resume import Resumption, complete, find_resumption, require_same_run
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.supervision.rank import Supervision


@dataclass(frozen=True, eq=False)
class Run:
    """What all parts of a run share: configuration, ranks, folder, phases and the checkpoint it goes on from.

    config: complete, with the values that an adapter or the checkpoint gives. phases: reports to supervision which
    phase this rank is in. resumption: the checkpoint that the run goes on from; None for a run that starts afresh.
    """

    config: Config
    topology: Topology
    backend: Backend
    folder: RunFolder
    supervision: Supervision
    phases: Phases
    resumption: Resumption | None

    @classmethod
    def begin(
        cls, config: Config, topology: Topology, backend: Backend, folder: RunFolder, supervision: Supervision
    ) -> Run:
        """Find the checkpoint to go on from, if train.resume asks for one. Collective.

        Raises UserError on every rank for a checkpoint that this run cannot go on from.
        """
        resumption = find_resumption(config, folder, topology)
        phases = Phases(supervision, backend)
        return cls(complete(config, resumption), topology, backend, folder, supervision, phases, resumption)

    @property
    def state(self) -> TrainingState | None:
        """The state of the checkpoint that the run goes on from."""
        return None if self.resumption is None else self.resumption.state

    @property
    def writes(self) -> bool:
        """True on the rank that writes files and speaks to the person who watches."""
        return self.topology.world_group.rank() == 0

    def open_folder(self, data: Data) -> None:
        """Lock the run folder and begin to log in it, once the input is known to be good.

        A start that failed for its input before this leaves no folder that would refuse the corrected one, and one
        that fails before `begin_in_folder` leaves nothing but its logs and FAILED. Raises
        UserError where going on from the checkpoint would give another result than not having stopped.
        """
        require_same_inputs(self.config, data, self.backend.device, afresh=self.resumption is None)
        if self.resumption is not None:
            require_same_run(self.config, self.resumption, data.state, data.held_out_state, data.course.steps)
        self.folder.open(self.topology.world_group.rank())
        self.supervision.in_folder(self.folder.path)

    def begin_in_folder(self) -> None:
        """Write what belongs to this start, once the state of the checkpoint is restored: until then it may be refused,
        and what an earlier start left must still say what it was."""
        if self.writes:
            within = self.resumption is not None and self.folder.holds(self.resumption.folder)
            self.folder.begin(self.config.to_yaml(), anew=self.config.output.overwrite and not within)


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
