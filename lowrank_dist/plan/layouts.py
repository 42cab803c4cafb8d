"""The layouts of a job on a cluster: all that are possible, those that fit, and the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.plan.hardware import Gpu, usable
from lowrank_dist.plan.job import Job, Layout
from lowrank_dist.plan.memory import Memory, memory
from lowrank_dist.plan.parameters import heaviest_rank
from lowrank_dist.plan.step_time import StepTime, step_time

_LARGEST_CLUSTER = 512  # nodes of the largest cluster that a remedy proposes


@dataclass(frozen=True)
class Cluster:
    """The nodes to plan for. memory: bytes per GPU."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    memory: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Fixed:
    """The parts of a layout that the user has fixed. The plan chooses those that are None."""

    tensor: int | None = None
    data: int | None = None
    sequence: bool | None = None
    micro_batch: int | None = None
    recompute: bool | None = None


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
    def missing_bytes(self) -> int:
        """Bytes by which a GPU is too small; 0 where it fits."""
        return max(0, self.memory.total - usable(self.cluster.memory))


@dataclass(frozen=True)
class Choice:
    """The chosen layout and its alternatives.

    best: the fastest that fits, or the smallest where none fits. remedies: changes that would make it fit.
    """

    best: Candidate
    runner_up: Candidate | None
    remedies: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.best.missing_bytes == 0


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


def choose(job: Job, fixed: Fixed, cluster: Cluster) -> Choice:
    """Return the fastest layout of `job` that fits the cluster and respects `fixed`, and the fastest of another kind.

    The kind of a layout is its tensor-parallel size, sequence parallelism and recomputation. Tensor-parallel groups
    stay inside a node unless nothing fits that way or `fixed` says otherwise. Raises UserError where no layout respects
    `fixed`.
    """
    if fixed.tensor is not None:
        job.architecture.check_tp(fixed.tensor)
    candidates = [Candidate(replace(job, layout=layout), cluster) for layout in _layouts(job, fixed, cluster)]
    if not candidates:
        raise UserError(_no_layout(job, fixed, cluster))
    fitting = [candidate for candidate in candidates if not candidate.missing_bytes]
    inside = [c for c in fitting if cluster.gpus_per_node % c.job.layout.tensor == 0]
    ranked = sorted(inside or fitting, key=lambda candidate: candidate.time.seconds)
    if not ranked:
        smallest = min(candidates, key=lambda candidate: candidate.memory.total)
        return Choice(smallest, None, tuple(_remedies(smallest, fixed)))
    best = ranked[0]
    others = (c for c in ranked if _kind(c.job.layout) != _kind(best.job.layout))
    return Choice(best, next(others, None), ())


def _kind(layout: Layout) -> tuple[int, bool, bool]:
    return layout.tensor, layout.sequence, layout.recompute


def _layouts(job: Job, fixed: Fixed, cluster: Cluster) -> Iterator[Layout]:
    sizes = (fixed.tensor,) if fixed.tensor is not None else job.architecture.legal_tp_sizes(cluster.gpus)
    for tensor in sizes:
        if cluster.gpus % tensor or job.footprint.reason_not_shardable(tensor):
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


def _no_layout(job: Job, fixed: Fixed, cluster: Cluster) -> str:
    where = f"{cluster.nodes} × {cluster.gpus_per_node} = {cluster.gpus} GPUs"
    if fixed.tensor is not None and cluster.gpus % fixed.tensor:
        return (
            f"parallel.tensor: {fixed.tensor} does not divide {where}; change --nodes or --gpus-per-node, or the size"
        )
    if fixed.tensor is not None and (reason := job.footprint.reason_not_shardable(fixed.tensor)):
        return reason
    if fixed.tensor is not None and fixed.data is not None and fixed.tensor * fixed.data != cluster.gpus:
        return f"parallel.data: {fixed.tensor} tensor × {fixed.data} data parallel is not {where}; leave it null"
    return (
        f"train.global_batch: {job.global_batch} samples do not give every data-parallel replica on {where} a sample; "
        "raise it, or plan for fewer GPUs"
    )


def _remedies(smallest: Candidate, fixed: Fixed) -> Iterator[str]:
    """Yield changes, each of which alone would make the smallest layout fit."""
    job, cluster = smallest.job, smallest.cluster
    layout = job.layout
    needed = smallest.memory.total
    if not layout.recompute:
        with_recompute = Candidate(replace(job, layout=replace(layout, recompute=True)), cluster)
        if not with_recompute.missing_bytes:
            yield "engine.recompute=full"
    if layout.micro_batch > 1:
        one = Candidate(replace(job, layout=replace(layout, micro_batch=1)), cluster)
        if not one.missing_bytes:
            yield "train.micro_batch=1"
    if job.decoding is not None and job.decoding.batch > 1:
        one = Candidate(replace(job, decoding=replace(job.decoding, batch=1)), cluster)
        if not one.missing_bytes:
            yield "eval.generate.batch=1"
    length = job.length // 2
    while length >= 128:
        if not Candidate(replace(job, length=length), cluster).missing_bytes:
            yield f"data.max_length={length}"
            break
        length //= 2
    nodes = 2 * cluster.nodes
    while nodes <= _LARGEST_CLUSTER:
        larger = replace(cluster, nodes=nodes)
        layouts = _layouts(job, replace(fixed, tensor=None, data=None), larger)
        found = next(
            (c for c in (Candidate(replace(job, layout=x), larger) for x in layouts) if not c.missing_bytes), None
        )
        if found is not None:
            across = " parallel.across_nodes=true" * (found.job.layout.tensor > cluster.gpus_per_node)
            yield f"--nodes {nodes} with parallel.tensor={found.job.layout.tensor}{across}"
            break
        nodes *= 2
    size = next(gigabytes for gigabytes in range(1, 10**6) if usable(gigabytes * 10**9) >= needed)
    yield f"GPUs of {size} GB"
