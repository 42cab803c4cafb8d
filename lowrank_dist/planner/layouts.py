"""The layouts of a job on a cluster: all that are possible, and those that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.planner.hardware import Gpu, bytes_in, gpu_of, usable
from lowrank_dist.planner.job import Job, Layout
from lowrank_dist.planner.memory import ACCURACY, Memory, memory
from lowrank_dist.planner.parameters import heaviest_rank
from lowrank_dist.planner.step_time import StepTime, step_time


@dataclass(frozen=True)
class Cluster:
    """The nodes to plan for.

    memory: bytes per GPU. free: bytes per rank that tensors can use; None to derive it from `memory`.
    """

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    memory: int
    free: int | None = None

    @classmethod
    def of(cls, nodes: int = 1, gpus_per_node: int = 8, gpu: str = "h100", gpu_memory: str | None = None) -> Cluster:
        """Return a cluster of GPUs that are known by name.

        gpu: a name such as h100, h100-pcie or "NVIDIA A100-SXM4-40GB". gpu_memory: of a GPU, with its unit ("80GB",
        "80GiB"); None for the GPU's own. Raises UserError for an unknown GPU, which lists those that are known, a size
        without a unit, and numbers below 1.
        """
        for option, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
            if value < 1:
                raise UserError(f"{option}: {value} is too small; give at least 1")
        card = gpu_of(gpu)
        return cls(
            nodes, gpus_per_node, card, card.memory if gpu_memory is None else bytes_in(gpu_memory, "--gpu-memory")
        )

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> int:
        """Bytes per rank that tensors can use."""
        return usable(self.memory) if self.free is None else self.free


@dataclass(frozen=True)
class Fixed:
    """The parts of a layout that the user has fixed. The plan chooses those that are None.

    across_nodes: a tensor-parallel group may lie on several nodes.
    """

    tensor: int | None = None
    data: int | None = None
    sequence: bool | None = None
    micro_batch: int | None = None
    recompute: bool | None = None
    across_nodes: bool = True


@dataclass(frozen=True)
class Candidate:
    """A job in one layout on a cluster."""

    job: Job
    cluster: Cluster

    @cached_property
    def tp_rank(self) -> int:
        return heaviest_rank(self.job)

    @cached_property
    def memory(self) -> Memory:
        return memory(self.job, self.tp_rank)

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.job, self.cluster.gpu, self.cluster.gpus_per_node, self.tp_rank)

    @property
    def spare(self) -> int:
        """Bytes of a GPU that remain; negative where the job does not fit."""
        return self.cluster.usable - self.memory.total

    @property
    def missing_bytes(self) -> int:
        """Bytes by which a GPU is too small; 0 where the job fits."""
        return max(0, -self.spare)

    @property
    def tight(self) -> bool:
        """True if the job fits, but leaves less memory than the largest error of a plan."""
        return 0 <= self.spare < ACCURACY * self.memory.total

    @property
    def crosses_nodes(self) -> bool:
        """True where a tensor-parallel group lies on several nodes."""
        return self.cluster.gpus_per_node % self.job.layout.tensor != 0


def tensor_sizes(arch: Architecture, largest: int) -> tuple[dict[int, str], list[int]]:
    """Return the illegal tensor-parallel sizes up to `largest`, each with the reason, and the legal sizes."""
    illegal, legal = {}, []
    for size in range(1, largest + 1):
        reason = arch.indivisible_by(size)
        if reason is None:
            legal.append(size)
        else:
            illegal[size] = reason
    return illegal, legal


def candidates(job: Job, fixed: Fixed, cluster: Cluster) -> list[Candidate]:
    """Return the job in every layout of the cluster that respects `fixed`."""
    return [Candidate(replace(job, layout=layout), cluster) for layout in _layouts(job, fixed, cluster)]


def fitting(tried: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that fit, fastest first; if some keep tensor-parallel groups inside nodes, only those."""
    found = [candidate for candidate in tried if not candidate.missing_bytes]
    inside = [candidate for candidate in found if not candidate.crosses_nodes]
    return sorted(inside or found, key=lambda candidate: candidate.time.seconds)


def _layouts(job: Job, fixed: Fixed, cluster: Cluster) -> Iterator[Layout]:
    sizes = (fixed.tensor,) if fixed.tensor is not None else job.architecture.legal_tp_sizes(cluster.gpus)
    for tensor in sizes:
        if cluster.gpus % tensor or job.footprint.reason_not_shardable(tensor):
            continue
        if not fixed.across_nodes and cluster.gpus_per_node % tensor:
            continue
        data = cluster.gpus // tensor
        if fixed.data not in (None, data) or data > job.global_batch:
            continue
        sequences = [tensor > 1] if fixed.sequence is None else [fixed.sequence and tensor > 1]
        for sequence in sequences:
            for micro_batch in _micro_batches(job.global_batch, data, fixed.micro_batch):
                for recompute in (False, True) if fixed.recompute is None else (fixed.recompute,):
                    yield Layout(tensor, data, sequence, micro_batch, recompute)


def _micro_batches(global_batch: int, data: int, fixed: int | None) -> list[int]:
    """Return [fixed], or the powers of two up to 64 that divide a replica's share of the global batch ([1] if none)."""
    if fixed is not None:
        return [fixed]
    share = global_batch // data
    return [
        size for size in (2**power for power in range(7)) if size <= share and global_batch % (size * data) == 0
    ] or [1]
