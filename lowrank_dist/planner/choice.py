"""The choice of a layout, and the changes that help where none fits or the choice is tight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank_dist.errors import UserError
from lowrank_dist.planner.hardware import GPUS, usable
from lowrank_dist.planner.job import Job, Layout
from lowrank_dist.planner.layouts import Candidate, Cluster, Fixed, candidates, fitting

_LARGEST_CLUSTER = 512  # nodes of the largest cluster that a remedy proposes


@dataclass(frozen=True)
class Remedy:
    """A change that makes a job fit. words: what to add to the command line. candidate: the job after the change."""

    words: str
    candidate: Candidate

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Choice:
    """The chosen layout and its alternatives.

    best: the fastest that fits, or the smallest if none fits. safe: the fastest that is not tight, else `best`.
    remedies: changes that make the job fit; a layout for the same nodes comes first.
    """

    best: Candidate
    safe: Candidate
    runner_up: Candidate | None
    remedies: tuple[Remedy, ...]

    @property
    def fits(self) -> bool:
        return self.best.missing_bytes == 0


def choose(job: Job, fixed: Fixed, cluster: Cluster) -> Choice:
    """Return the fastest layout of `job` that fits the cluster and respects `fixed`, and the fastest of another kind.

    The kind of a layout is its tensor-parallel size, sequence parallelism and recomputation. Tensor-parallel groups
    stay inside a node unless nothing fits that way or `fixed` says otherwise. Raises UserError where no layout respects
    `fixed`.
    """
    try:
        tried = _tried(job, fixed, cluster)
    except UserError as error:
        remedy = fitting_layout(job, fixed, cluster)
        words = "" if remedy is None else f"; the job fits these nodes with {remedy}"
        raise UserError(f"{error}{words}") from None
    ranked = fitting(tried)
    if not ranked:
        smallest = min(tried, key=lambda candidate: candidate.memory.total)
        return Choice(smallest, smallest, None, tuple(_remedies(smallest, fixed)))
    best = ranked[0]
    others = (c for c in ranked if _kind(c.job.layout) != _kind(best.job.layout))
    return Choice(best, _safe(ranked), next(others, None), ())


def fitting_layout(job: Job, fixed: Fixed, cluster: Cluster) -> Remedy | None:
    """Return the change of layout that makes the job fit on the same nodes, or None.

    It changes as few of the fixed keys as possible. A layout that stays inside nodes and leaves a margin is preferred.
    """
    sizes = replace(fixed, tensor=None, data=None, sequence=None, across_nodes=True)
    found = []
    for freed in (replace(fixed, data=None), sizes, replace(sizes, micro_batch=None), Fixed()):
        ranked = fitting(candidates(job, freed, cluster))
        found += [_safe(ranked)] if ranked else []
    if not found:
        return None
    wanted = min(found, key=lambda candidate: (candidate.crosses_nodes, candidate.tight))
    words = " ".join(_overrides(fixed, wanted))
    return Remedy(words, wanted) if words else None


def safer(found: Candidate) -> Remedy | None:
    """Return the change from a tight layout to the fastest layout of the same nodes that is not tight, or None."""
    layout = found.job.layout
    asked = Fixed(layout.tensor, layout.data, layout.sequence, layout.micro_batch, layout.recompute)
    remedy = fitting_layout(found.job, asked, found.cluster)
    return None if remedy is None or remedy.candidate.tight else remedy


def _tried(job: Job, fixed: Fixed, cluster: Cluster) -> list[Candidate]:
    """Return the candidates. Raises UserError, without a remedy, where there is none."""
    if fixed.tensor is not None:
        job.architecture.check_tp(fixed.tensor)
    found = candidates(job, fixed, cluster)
    if not found:
        raise UserError(_reason_without_layout(job, fixed, cluster))
    return found


def _safe(ranked: Sequence[Candidate]) -> Candidate:
    return next((candidate for candidate in ranked if not candidate.tight), ranked[0])


def _kind(layout: Layout) -> tuple[int, bool, bool]:
    return layout.tensor, layout.sequence, layout.recompute


def _reason_without_layout(job: Job, fixed: Fixed, cluster: Cluster) -> str:
    where = f"{cluster.nodes} × {cluster.gpus_per_node} = {cluster.gpus} GPUs"
    if fixed.tensor is not None and cluster.gpus % fixed.tensor:
        return (
            f"parallel.tensor: {fixed.tensor} does not divide {where}; change --nodes or --gpus-per-node, or the size"
        )
    if fixed.tensor is not None and (reason := job.footprint.reason_not_shardable(fixed.tensor)):
        return reason
    if fixed.tensor is not None and fixed.data is not None and fixed.tensor * fixed.data != cluster.gpus:
        return f"parallel.data: {fixed.tensor} tensor × {fixed.data} data parallel is not {where}; leave it null"
    if fixed.tensor is None and fixed.data is not None and candidates(job, replace(fixed, data=None), cluster):
        return (
            f"parallel.data: no tensor-parallel size of this model gives {fixed.data} data-parallel replicas on "
            f"{where}; leave it null"
        )
    return (
        f"train.global_batch: {job.global_batch} samples do not give every data-parallel replica on {where} a sample; "
        "raise it, or plan for fewer GPUs with --gpus-per-node N and --nodes N (default: one node of 8)"
    )


def _overrides(fixed: Fixed, wanted: Candidate) -> Iterator[str]:
    """Yield the overrides that turn what is fixed into the wanted layout."""
    layout = wanted.job.layout
    if fixed.tensor not in (None, layout.tensor):
        yield f"parallel.tensor={layout.tensor}"
    if fixed.data not in (None, layout.data):
        yield "parallel.data=null"
    if layout.tensor > 1 and fixed.sequence not in (None, layout.sequence):
        yield "parallel.sequence=null"
    if fixed.micro_batch not in (None, layout.micro_batch):
        yield f"train.micro_batch={layout.micro_batch}"
    if fixed.recompute not in (None, layout.recompute):
        yield f"engine.recompute={'full' if layout.recompute else 'none'}"
    if wanted.crosses_nodes:
        yield "parallel.across_nodes=true"


def _remedies(smallest: Candidate, fixed: Fixed) -> Iterator[Remedy]:
    """Yield changes, each of which alone would make the smallest layout fit."""
    job, cluster, layout = smallest.job, smallest.cluster, smallest.job.layout
    here = fitting_layout(job, fixed, cluster)
    if here is not None:
        yield here
    yield from _auto(job, fixed, cluster)
    changes: list[tuple[str, Job]] = []
    if not layout.recompute:
        changes.append(("engine.recompute=full", replace(job, layout=replace(layout, recompute=True))))
    if layout.micro_batch > 1:
        changes.append(("train.micro_batch=1", replace(job, layout=replace(layout, micro_batch=1))))
    if job.decoding is not None and job.decoding.batch > 1:
        changes.append(("eval.generate.batch=1", replace(job, decoding=replace(job.decoding, batch=1))))
    for words, changed in changes:
        candidate = Candidate(changed, cluster)
        if not candidate.missing_bytes and (here is None or words != here.words):
            yield Remedy(words, candidate)
    yield from _shorter(smallest)
    yield from _more_nodes(smallest, fixed)
    yield from _larger_gpus(smallest)


def _auto(job: Job, fixed: Fixed, cluster: Cluster) -> Iterator[Remedy]:
    """Yield parallel.tensor=auto where a size was fixed and the size that auto chooses fits."""
    ranked = fitting(candidates(job, replace(fixed, tensor=None, across_nodes=False), cluster))
    if fixed.tensor is not None and ranked:
        tensor = _safe(ranked).job.layout.tensor
        yield Remedy("parallel.tensor=auto", next(found for found in ranked if found.job.layout.tensor == tensor))


def _shorter(smallest: Candidate) -> Iterator[Remedy]:
    length = smallest.job.length // 2
    while length >= 128:
        candidate = Candidate(replace(smallest.job, length=length), smallest.cluster)
        if not candidate.missing_bytes:
            yield Remedy(f"data.max_length={length}", candidate)
            return
        length //= 2


def _more_nodes(smallest: Candidate, fixed: Fixed) -> Iterator[Remedy]:
    freed, nodes = replace(fixed, tensor=None, data=None), 2 * smallest.cluster.nodes
    while nodes <= _LARGEST_CLUSTER:
        ranked = fitting(candidates(smallest.job, freed, replace(smallest.cluster, nodes=nodes)))
        if ranked:
            found = _safe(ranked)
            words = [f"--nodes {nodes}", f"parallel.tensor={found.job.layout.tensor}"]
            yield Remedy(" ".join([*words, *_overrides(replace(fixed, tensor=None), found)]), found)
            return
        nodes *= 2


def _larger_gpus(smallest: Candidate) -> Iterator[Remedy]:
    """Yield the smallest GPU that is large enough and no slower; its memory alone where the user gave the memory."""
    cluster = smallest.cluster
    own = cluster.gpu
    large = [
        gpu
        for gpu in GPUS.values()
        if usable(gpu.memory) >= smallest.memory.total
        and (gpu.flops >= own.flops and gpu.bandwidth >= own.bandwidth and gpu.node >= own.node)
    ]
    if not large:
        return
    gpu = min(large, key=lambda gpu: gpu.memory)
    words, memory = f"--gpu {gpu.name}", gpu.memory
    if cluster.memory != own.memory:
        gibibytes = next(size for size in range(1, 10**6) if usable(size * 2**30) >= smallest.memory.total)
        words, gpu, memory = f"--gpu-memory {gibibytes}GiB", own, gibibytes * 2**30
    yield Remedy(words, Candidate(smallest.job, replace(cluster, gpu=gpu, memory=memory)))
