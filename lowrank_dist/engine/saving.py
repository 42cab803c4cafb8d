"""Adapters out of a running job: whole factors gathered, written by one rank, success agreed by all."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lowrank_dist.backend.select import Backend
from lowrank_dist.checkpoint.adapter import Adapter, LowRankFactor, write_adapter
from lowrank_dist.checkpoint.provenance import Provenance
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import UserError
from lowrank_dist.lora.inject import AdaptedLinear
from lowrank_dist.lora.state import adapter_factors, gather_factors
from lowrank_dist.parallel.agreement import all_equal, all_succeeded, digest
from lowrank_dist.parallel.topology import Topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter folder says beside its factors. `modules`: checkpoint.adapter.module_paths of the base."""

    dropout: float
    rslora: bool
    fan_in_fan_out: bool
    base: Path
    modules: Collection[str]
    provenance: Provenance


class AdapterSaver:
    """Writes checkpoints/step-N, keeps the links last and best, and at the end adapter/."""

    def __init__(
        self,
        folder: RunFolder,
        adapted: Sequence[AdaptedLinear],
        facts: AdapterFacts | None,
        topology: Topology,
        backend: Backend,
    ) -> None:
        """`facts` is needed on rank 0 of the job only, which writes."""
        self._folder, self._adapted, self._facts = folder, adapted, facts
        self._topology, self._backend = topology, backend
        self._writes = topology.world_group.rank() == 0
        self._eval_losses: dict[int, float] = {}
        self._saved: list[int] = []

    def evaluated(self, step: int, loss: float) -> None:
        """Remember an eval loss; `best` points to the saved step with the lowest."""
        self._eval_losses[step] = loss

    def save(self, step: int, *, final: bool) -> None:
        """Collective over all ranks. Raises UserError on every rank when the writing rank failed."""
        self._require_equal_replicas()
        error: UserError | None = None
        if self._topology.dp_rank == 0:
            whole = gather_factors(self._adapted, self._topology.tp_group)
            if self._writes:
                try:
                    self._write(step, adapter_factors(whole), final)
                except UserError as failure:
                    error = failure
                except OSError as failure:  # the other ranks wait for an answer: any failure to write is one
                    error = UserError(f"step {step}: cannot save to {self._folder.path}: {failure}; is the disk full?")
        if not all_succeeded(error is None, self._topology.world_group, self._backend.device):
            raise error or UserError(f"step {step}: rank 0 could not save the adapter; see its message")

    def keep_probe(self, input_ids: Tensor, logits: Tensor) -> None:
        """Write probe.safetensors: input_ids [b, s] int64 and the trained model's logits [b, s, V] fp32."""
        if self._writes:
            tensors = {"input_ids": input_ids, "logits": logits.float()}
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, self._folder.probe)

    def _write(self, step: int, factors: dict[str, LowRankFactor], final: bool) -> None:
        facts = self._facts
        adapter = Adapter(factors, facts.dropout, facts.rslora, facts.fan_in_fan_out, str(facts.base))
        target = self._folder.checkpoints / f"step-{step}"
        write_adapter(target, adapter, facts.provenance, facts.modules, trained=True)
        self._saved.append(step)
        self._folder.point("last", target)
        known = [saved for saved in self._saved if saved in self._eval_losses]
        if known:
            best = min(known, key=lambda saved: self._eval_losses[saved])
            self._folder.point("best", self._folder.checkpoints / f"step-{best}")
        if final:
            write_adapter(self._folder.adapter, adapter, facts.provenance, facts.modules, trained=True)
        logger.info("adapter of step %d written to %s", step, target)

    def _require_equal_replicas(self) -> None:
        """A replicated factor that differs between tensor-parallel ranks has lost its deferred sum somewhere."""
        replicated = [p for linear in self._adapted for p in linear.factors.parameters() if p.tp_partial_grad]
        if not all_equal(digest(replicated), self._topology.tp_group, self._backend.device):
            raise UserError(
                "replicated factors differ between tensor-parallel ranks: the adapter would be wrong and is not saved. "
                "This is a fault of the machine or of lowrank_dist; please report it with the logs of all ranks"
            )
