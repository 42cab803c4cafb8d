"""The tensor- and data-parallel process groups of a rank, and the same groups in the form that DeepSpeed needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from lowrank_dist.errors import UserError
from lowrank_dist.parallel.collectives import host_names
from lowrank_dist.parallel.coordinates import Grid, RankCoordinates


@dataclass(frozen=True)
class Topology:
    """The process groups, and the place of this rank in them.

    Tensor-parallel ranks are consecutive, so that a group of at most a node's size lies inside a node.

    host_group: all ranks over gloo, for tensors in host memory. It is reserved for checkpoints, whose thread may send
    while training uses the other groups. hosts: the name of every rank's
    node (backend/node.py); different nodes have different names.
    """

    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: ProcessGroup
    dp_group: ProcessGroup
    world_group: ProcessGroup
    host_group: ProcessGroup
    hosts: tuple[str, ...]
    sequence_parallel: bool

    @property
    def grid(self) -> Grid:
        """The coordinates of every rank of the job."""
        return Grid(self.tp_size, self.dp_size)

    @property
    def coordinates(self) -> RankCoordinates:
        """The coordinates of this rank, which decide its slices of Θ."""
        return self.grid.coordinates(self.world_group.rank())

    @classmethod
    def build(
        cls,
        tensor: int,
        data: int | None,
        sequence: bool | None,
        timeout_seconds: int,
        *,
        across_nodes: bool = False,
        fitting: Collection[int] | None = None,
    ) -> Topology:
        """Build Megatron's process groups over all ranks of torch's initialised process group.

        fitting: tensor-parallel sizes that divide the model, the only ones that errors suggest; None for all.

        Raises UserError where TP × DP ≠ ranks, and where a tensor-parallel group crosses nodes unless `across_nodes`.
        """
        world = dist.get_world_size()
        require_sizes(world, tensor, data, fitting)
        # A step on fake tensors has no other ranks to talk to, and uses one backend for all groups.
        fake = dist.get_backend() == "fake"
        host_group = dist.new_group(backend="fake" if fake else "gloo", timeout=timedelta(seconds=timeout_seconds))
        hosts = ("",) * world if fake else host_names(host_group)
        if not across_nodes:
            refuse_crossing(hosts, tensor, fitting)
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timedelta(seconds=timeout_seconds) / timedelta(minutes=1),
        )
        world_group = dist.group.WORLD
        assert world_group is not None, "the process group was initialised above"
        return cls(
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=tensor,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=world // tensor,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(),
            world_group=world_group,
            host_group=host_group,
            hosts=hosts,
            sequence_parallel=tensor > 1 and sequence is not False,
        )


def require_sizes(world: int, tensor: int, data: int | None, fitting: Collection[int] | None = None) -> None:
    """Raise UserError where TP × DP is not the number of ranks. data: None for whatever fits.

    fitting: as in `Topology.build`.
    """
    if world % tensor or (data is not None and tensor * data != world):
        wanted = f"parallel.tensor={tensor}" + (f" × parallel.data={data}" if data is not None else "")
        raise UserError(
            f"{wanted} does not fit {world} ranks, since tensor × data must be the number of ranks. With {world} "
            f"ranks parallel.tensor may be {_divisors(world, fitting)}; leave parallel.data unset"
        )


def _divisors(number: int, among: Collection[int] | None) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0 and (among is None or n in among))


def refuse_crossing(hosts: Sequence[str], tensor: int, fitting: Collection[int] | None = None) -> None:
    """Raise UserError where a group of `tensor` consecutive ranks lies on more than one host.

    In such a group every layer would wait for the network. fitting: as in `Topology.build`.
    """
    for first in range(0, len(hosts), tensor):
        group = hosts[first : first + tensor]
        if len(set(group)) > 1:
            sizes = _divisors(math.gcd(*Counter(hosts).values()), fitting)
            raise UserError(
                f"parallel.tensor: with {tensor}, ranks {first} to {first + tensor - 1} of one tensor-parallel group "
                f"are on {' and '.join(dict.fromkeys(group))}, so every layer would wait for the network; set it to "
                f"{sizes}, or set parallel.across_nodes=true"
            )


class DeepSpeedMpu:
    """The `mpu` that ZeRO needs to shard over data parallelism only.

    Without it DeepSpeed broadcasts rank 0's shards over every other tensor-parallel rank's. There is deliberately no
    get_sequence_* here: its presence makes ZeRO ignore model parallelism.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._topology.dp_group

    def get_data_parallel_world_size(self) -> int:
        return self._topology.dp_size

    def get_data_parallel_rank(self) -> int:
        return self._topology.dp_rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._topology.dp_group)

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._topology.tp_group

    def get_model_parallel_rank(self) -> int:
        return self._topology.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tp_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1
