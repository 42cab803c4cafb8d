"""Θ and its moments from every rank's ZeRO partitions, whole, on rank 0.

Each rank sends what it alone holds, so rank 0 receives 12·|Θ| bytes whatever the topology is. Nothing here touches the
groups that training uses: it runs in the checkpoint's thread, over the topology's host_group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.checkpoint.training_state import KINDS
from lowrank_dist.engine.zero import ZeroOptimiser
from lowrank_dist.errors import UserError
from lowrank_dist.lora.inject import AdaptedLinear, shards_of
from lowrank_dist.lora.state import WholeFactor, join_factors
from lowrank_dist.parallel.factors import b_elements
from lowrank_dist.parallel.topology import Topology


class Gathering:
    """Collective to make: the ranks tell each other which elements of Θ their partitions hold."""

    def __init__(self, adapted: Sequence[AdaptedLinear], optimiser: ZeroOptimiser, topology: Topology) -> None:
        self._adapted, self._topology = adapted, topology
        self._parameters = [p for linear in adapted for p in (linear.factors.lora_A, linear.factors.lora_B)]
        own = torch.tensor(optimiser.fragments(), dtype=torch.int64)
        tables = [torch.empty_like(own) for _ in range(topology.world_group.size())]
        dist.all_gather(tables, own, group=topology.host_group)
        # Of each rank, in order: (number of the parameter, first element, elements).
        self._held = [
            [(number, start, count) for number, (start, count) in enumerate(table.tolist()) if count]
            for table in tables
        ]

    def collect(self, snapshot: Tensor) -> dict[str, dict[str, WholeFactor]] | None:
        """Kind (of KINDS) → module path → whole factor, on rank 0; None elsewhere.

        snapshot: [3, elements] of `ZeroOptimiser.snapshot`. Raises UserError where replicated factors or their moments
        differ between tensor-parallel ranks.
        """
        rank, group = self._topology.world_group.rank(), self._topology.host_group
        digest, sent = self._digest(snapshot), self._sent_of(rank, snapshot)
        if rank:
            dist.send(digest, 0, group=group)
            if sent.numel():
                dist.send(sent, 0, group=group)
            return None
        digests, received = [digest], [sent]
        for other in range(1, self._topology.world_group.size()):
            digests.append(torch.empty_like(digest))
            dist.recv(digests[-1], other, group=group)
            received.append(torch.empty(len(KINDS), sum(count for *_, count in self._sends(other))))
            if received[-1].numel():
                dist.recv(received[-1], other, group=group)
        self._require_equal_replicas([int(each) for each in digests])
        return self._join(received)

    def _sends(self, rank: int) -> list[tuple[int, int, int]]:
        """What of its fragments a rank sends: a replicated factor comes from tensor-parallel rank 0 alone."""
        first = rank % self._topology.tp_size == 0
        return [held for held in self._held[rank] if first or not self._parameters[held[0]].tp_partial_grad]

    def _sent_of(self, rank: int, snapshot: Tensor) -> Tensor:
        pieces = self._pieces(rank, snapshot)
        wanted = [pieces[number] for number, *_ in self._sends(rank)]
        return torch.cat(wanted, dim=1) if wanted else snapshot.new_empty(len(KINDS), 0)

    def _pieces(self, rank: int, snapshot: Tensor) -> dict[int, Tensor]:
        counts = [count for *_, count in self._held[rank]]
        return {held[0]: piece for held, piece in zip(self._held[rank], snapshot.split(counts, dim=1), strict=True)}

    def _digest(self, snapshot: Tensor) -> Tensor:
        sha = hashlib.sha256()
        for number, piece in self._pieces(self._topology.world_group.rank(), snapshot).items():
            if self._parameters[number].tp_partial_grad:
                sha.update(piece.contiguous().view(torch.uint8).numpy())
        return torch.tensor(int.from_bytes(sha.digest()[:8], "little", signed=True), dtype=torch.int64)

    def _require_equal_replicas(self, digests: Sequence[int]) -> None:
        """A replicated factor that differs between tensor-parallel ranks has lost its deferred sum somewhere."""
        size = self._topology.tp_size
        if any(len(set(digests[at : at + size])) > 1 for at in range(0, len(digests), size)):
            raise UserError(
                "replicated factors differ between tensor-parallel ranks: the adapter would be wrong and is not saved. "
                "This is a fault of the machine or of lowrank_dist; please report it with the logs of all ranks"
            )

    def _join(self, received: Sequence[Tensor]) -> dict[str, dict[str, WholeFactor]]:
        size = self._topology.tp_size
        whole: dict[tuple[int, int], Tensor] = {}
        for rank, tensor in enumerate(received):
            at = 0
            for number, start, count in self._sends(rank):
                key = (rank % size, number)
                if key not in whole:
                    whole[key] = torch.zeros(len(KINDS), self._elements(*key))
                whole[key][:, start : start + count] = tensor[:, at : at + count]
                at += count

        def shard(kind: int, tp_rank: int, linear: int) -> tuple[Tensor, Tensor]:
            a, b = (
                whole[0 if self._parameters[number].tp_partial_grad else tp_rank, number][kind]
                for number in (2 * linear, 2 * linear + 1)
            )
            return a.view(self._parameters[2 * linear].shape), b

        return {
            name: join_factors(self._adapted, size, lambda tp_rank, linear, kind=kind: shard(kind, tp_rank, linear))
            for kind, name in enumerate(KINDS)
        }

    def _elements(self, tp_rank: int, number: int) -> int:
        """Elements of a parameter on another tensor-parallel rank: A is the same everywhere, B need not be."""
        if number % 2 == 0 or self._parameters[number].tp_partial_grad:
            return self._parameters[number].numel()
        return max(1, b_elements(shards_of(self._adapted[number // 2].placement, tp_rank, self._topology.tp_size)))
