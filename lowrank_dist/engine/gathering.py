"""Θ and its moments from every rank's ZeRO partitions, whole, on rank 0.

Each rank sends what it alone holds, so rank 0 receives 12·|Θ| bytes whatever the topology is. Nothing here touches the
groups that training uses: it runs in the checkpoint's thread, over the topology's host_group.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.checkpoint.training_state import KINDS
from lowrank_dist.engine.zero import ZeroOptimiser
from lowrank_dist.errors import UserError
from lowrank_dist.lora.inject import AdaptedLinear, shards_of, theta_of
from lowrank_dist.lora.state import WholeFactor, join_factors
from lowrank_dist.parallel.agreement import digest
from lowrank_dist.parallel.topology import Topology


class Gathering:
    """Collective to make: the ranks tell each other which elements of Θ their partitions hold."""

    def __init__(self, adapted: Sequence[AdaptedLinear], optimiser: ZeroOptimiser, topology: Topology) -> None:
        self._adapted, self._topology = adapted, topology
        self._parameters = theta_of(adapted)
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
        own, sent = self._digest(snapshot), self._sent_of(rank, snapshot)
        if rank:
            dist.send(own, 0, group=group)
            if sent.numel():
                dist.send(sent, 0, group=group)
            return None
        digests, received = [own], [sent]
        for other in range(1, self._topology.world_group.size()):
            digests.append(torch.empty_like(own))
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
        pieces = self._pieces(self._topology.world_group.rank(), snapshot)
        replicated = (piece for number, piece in pieces.items() if self._parameters[number].tp_partial_grad)
        return torch.tensor(digest(replicated), dtype=torch.int64)

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
        pieces: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for rank, tensor in enumerate(received):
            sends = self._sends(rank)
            counts = [count for *_, count in sends]
            for (number, start, _), piece in zip(sends, tensor.split(counts, dim=1), strict=True):
                pieces.setdefault((rank % size, number), []).append((start, piece))
        # The fragments of all data-parallel ranks make up a parameter without a hole.
        whole = {
            key: torch.cat([piece for _, piece in sorted(found, key=itemgetter(0))], dim=1)
            for key, found in pieces.items()
        }

        def held(tp_rank: int, linear: int) -> tuple[Tensor, Tensor]:
            a, b = (
                whole[0 if self._parameters[number].tp_partial_grad else tp_rank, number]
                for number in (2 * linear, 2 * linear + 1)
            )
            return a.view(len(KINDS), *self._parameters[2 * linear].shape), b

        joined: dict[str, dict[str, WholeFactor]] = {kind: {} for kind in KINDS}
        for number, linear in enumerate(self._adapted):
            layout = [shards_of(linear.placement, rank, size) for rank in range(size)]
            shards = [held(rank, number) for rank in range(size)]
            for index, kind in enumerate(KINDS):
                joined[kind] |= join_factors(linear, layout, [(a[index], b[index]) for a, b in shards])
        return joined
