"""Gathers Θ and its moments from the ZeRO partitions of all ranks, unsharded, on rank 0, a few tensors at a time.

Every element is sent by one rank only, so rank 0 gets 12·|Θ| bytes at any topology. This runs in the checkpoint's
thread over the topology's host_group, and never uses the process groups of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.checkpoint.training_state import KINDS
from lowrank_dist.engine.zero import ZeroOptimiser
from lowrank_dist.errors import UserError
from lowrank_dist.parallel.collectives import digest
from lowrank_dist.parallel.coordinates import RankCoordinates
from lowrank_dist.parallel.theta import Theta, copy_to_whole, is_sharded
from lowrank_dist.parallel.topology import Topology

# Elements of unsharded Θ that rank 0 holds at a time; more where one parameter is larger. Low-rank Θ is mostly smaller.
BATCH_ELEMENTS = 2**24


class Gathering:
    """Gathers Θ and its Adam state from all ranks on rank 0.

    The constructor is collective: ranks tell each other which elements of Θ their partitions hold.
    """

    def __init__(self, theta: Theta, optimiser: ZeroOptimiser, topology: Topology) -> None:
        self._theta, self._topology = theta, topology
        self._coordinates = [topology.grid.coordinates(rank) for rank in range(topology.grid.world)]
        self._batches = theta.batches(BATCH_ELEMENTS)
        own = torch.tensor(optimiser.fragments(), dtype=torch.int64)
        tables = [torch.empty_like(own) for _ in range(topology.world_group.size())]
        dist.all_gather(tables, own, group=topology.host_group)
        # For each rank, in order: (index of the parameter, first element, number of elements).
        self._fragments = [
            [(number, start, count) for number, (start, count) in enumerate(table.tolist()) if count]
            for table in tables
        ]

    def stream(self, snapshot: Tensor, *, require_equal: bool = True) -> Iterator[dict[str, Tensor]]:
        """Yield on rank 0, in the order of `Theta.trained`: stored name → unsharded [3, *shape], in the order of KINDS.

        snapshot: [3, elements] of `ZeroOptimiser.snapshot`. Every rank must exhaust the iterator, which yields nothing
        on other ranks. Raises UserError where copies of a parameter, or their moments, differ between tensor-parallel
        ranks, unless `require_equal` is off; then the first rank's copy is taken.
        """
        rank, group = self._topology.world_group.rank(), self._topology.host_group
        pieces, size = self._pieces(rank, snapshot), self._topology.world_group.size()
        own = self._digest(snapshot)
        digests = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(digests, own, group=group)
        # Every rank checks before any rank sends: after an error nobody would receive.
        if require_equal:
            self._require_equal_copies([int(each) for each in digests])
        if rank:
            for batch in self._batches:
                sent = [pieces[number] for number, *_ in self._sends(rank, batch)]
                if sent:
                    dist.send(torch.cat(sent, dim=1), 0, group=group)
            return
        for batch in self._batches:
            received = [[pieces[number] for number, *_ in self._sends(0, batch)]]
            for other in range(1, size):
                counts = [count for *_, count in self._sends(other, batch)]
                message = torch.empty(len(KINDS), sum(counts))
                if counts:
                    dist.recv(message, other, group=group)
                received.append(list(message.split(counts, dim=1)))
            yield self._join(batch, received)

    def _sends(self, rank: int, batch: Sequence[int]) -> list[tuple[int, int, int]]:
        """Return the fragments of the parameters in `batch` that `rank` sends."""
        coordinates, trained = self._coordinates[rank], self._theta.trained
        return [
            fragment
            for fragment in self._fragments[rank]
            if fragment[0] in batch and trained[fragment[0]].is_sent_by(coordinates)
        ]

    def _pieces(self, rank: int, snapshot: Tensor) -> dict[int, Tensor]:
        counts = [count for *_, count in self._fragments[rank]]
        return {
            fragment[0]: piece
            for fragment, piece in zip(self._fragments[rank], snapshot.split(counts, dim=1), strict=True)
        }

    def _digest(self, snapshot: Tensor) -> Tensor:
        pieces = self._pieces(self._topology.world_group.rank(), snapshot)
        parameters = self._theta.parameters
        copies = (piece for number, piece in pieces.items() if not is_sharded(parameters[number]))
        return torch.tensor(digest(copies), dtype=torch.int64)

    def _require_equal_copies(self, digests: Sequence[int]) -> None:
        """Raise UserError where copies differ between tensor-parallel ranks: a deferred sum was lost somewhere."""
        size = self._topology.tp_size
        if any(len(set(digests[at : at + size])) > 1 for at in range(0, len(digests), size)):
            raise UserError(
                "replicated parameters differ between tensor-parallel ranks, so the trained weights are wrong and "
                "are not saved. This is a fault of the machine or a bug of lowrank_dist; report it with the logs of "
                "all ranks"
            )

    def _join(self, batch: Sequence[int], received: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        trained, kinds = self._theta.trained, range(len(KINDS))
        # (parameter, shard) → its fragments with their first elements, and the coordinates of a rank that sent one.
        fragments: dict[tuple[int, tuple[int, int]], list[tuple[int, Tensor]]] = {}
        coordinates_of: dict[tuple[int, tuple[int, int]], RankCoordinates] = {}
        for rank, tensors in enumerate(received):
            for (number, start, _), piece in zip(self._sends(rank, batch), tensors, strict=True):
                key = number, trained[number].shard_key(self._coordinates[rank])
                fragments.setdefault(key, []).append((start, piece))
                coordinates_of[key] = self._coordinates[rank]
        whole = {
            name: torch.zeros(len(KINDS), *shape) for number in batch for name, shape in trained[number].shapes.items()
        }
        of_kind = [{name: tensor[kind] for name, tensor in whole.items()} for kind in kinds]
        for (number, shard_key), found in fragments.items():
            local_shard = trained[number].shard_at(coordinates_of[number, shard_key])
            # Together the fragments of all data-parallel ranks cover the parameter without a gap.
            parts = [piece for _, piece in sorted(found, key=itemgetter(0))]
            local = torch.cat(parts, dim=1).view(len(KINDS), *local_shard.shape)
            for kind in kinds:
                copy_to_whole(local_shard.slices, local[kind], of_kind[kind])
        return whole
