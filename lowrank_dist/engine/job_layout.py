"""The layout of a job on its nodes, planned before the job is submitted. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lowrank_dist.engine.planning import Request, fixed_of, job_of
from lowrank_dist.errors import UserError
from lowrank_dist.planner.choice import choose, fitting_layout
from lowrank_dist.planner.job import Job
from lowrank_dist.planner.layouts import Candidate, Cluster, Fixed
from lowrank_dist.planner.memory import ACCURACY
from lowrank_dist.planner.parameters import host_bytes, saving_bytes


@dataclass(frozen=True)
class JobLayout:
    """A planned layout.

    chosen: overrides for the keys that config and command line leave open. warning: None if it fits with a margin.
    """

    candidate: Candidate
    chosen: tuple[str, ...]
    warning: str | None

    @property
    def nodes(self) -> str:
        cluster = self.candidate.cluster
        return f"{cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu.name}"

    @property
    def host_memory(self) -> str:
        """The host memory that the job's nodes need, in words."""
        job, ranks = self.candidate.job, self.candidate.cluster.gpus_per_node
        loading, saving = (math.ceil(size / 2**30) for size in (host_bytes(job, ranks), saving_bytes(job)))
        return (
            f"A node needs {loading} GiB while it loads, by the plan, and the first one {saving} GiB more while it "
            "saves."
        )

    def __str__(self) -> str:
        job, cluster = self.candidate.job, self.candidate.cluster
        planned = f"{self.candidate.memory.total / 2**30:.1f}"
        if job.device == "cpu":
            return f"{job.layout}; {planned} GiB of memory a rank"
        available = f"{cluster.usable / 2**30:.1f} usable GiB of each {cluster.gpu.name}"
        return f"{job.layout}; {planned} of {available}, {self.candidate.time.seconds:.3g} s a step"


def job_layout(request: Request, cluster: Cluster) -> JobLayout:
    """Return the fastest layout that fits the cluster and agrees with all keys that config and command line set.

    Every row is assumed to have data.max_length tokens, all of them targets. A CPU run takes the whole layout from its
    config. Raises UserError where no layout fits, with one that does as the remedy, and where a tensor-parallel group
    would cross nodes without parallel.across_nodes. With train.ignore_plan, lack of memory is a warning.
    """
    config, job = request.config, job_of(request, 1.0)
    fixed = fixed_of(replace(request, whole=job.device == "cpu"))
    choice = choose(job, fixed, cluster)
    best, short = choice.best, choice.best.missing_bytes / 2**30
    layout = best.job.layout
    where = f"{cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu.name}"
    if not choice.fits and not config.train.ignore_plan:
        others = ", or ".join(map(str, choice.remedies))
        remedy = _remedy(job, fixed, cluster) or (f"; it fits with {others}" if others else "")
        raise UserError(f"{request.model.name} does not fit {where} as {layout}: a GPU lacks {short:.1f} GiB{remedy}")
    if best.crosses_nodes and not config.parallel.across_nodes:
        raise UserError(
            f"parallel.across_nodes is false, but on {where} the layout {layout} puts a tensor-parallel group on "
            f"several nodes, where every layer waits for the network{_remedy(job, fixed, cluster)}"
        )
    return JobLayout(best, tuple(_overrides(best, request)), _warning(best, where))


def _remedy(job: Job, fixed: Fixed, cluster: Cluster) -> str:
    """Return the remedy that names a layout that fits these nodes; empty where there is none."""
    found = fitting_layout(job, fixed, cluster)
    return "" if found is None else f"; the job fits these nodes with {found}"


def _overrides(candidate: Candidate, request: Request) -> list[str]:
    """Return the candidate's values of the keys that the request leaves open."""
    if candidate.job.device == "cpu":
        return []
    config = request.config
    given = {
        f"{name}.{key}" for name in ("parallel", "train", "engine") for key in getattr(config, name).model_fields_set
    }
    if config.parallel.tensor == "auto":
        given.discard("parallel.tensor")  # the other keys are chosen for this size
    return [f"{key}={value}" for key, value in _values(candidate).items() if key not in given]


def _values(candidate: Candidate) -> dict[str, str]:
    layout = candidate.job.layout
    return {
        "parallel.tensor": str(layout.tensor),
        "train.micro_batch": str(layout.micro_batch),
        "engine.recompute": "full" if layout.recompute else "none",
    }


def _warning(candidate: Candidate, where: str) -> str | None:
    if candidate.missing_bytes:
        missing = candidate.missing_bytes / 2**30
        return f"by the plan each GPU of {where} lacks {missing:.1f} GiB; train.ignore_plan=true starts it anyway"
    if candidate.job.device == "cuda" and candidate.tight:
        return (
            f"memory is tight: {candidate.spare / 2**30:.2f} GiB of each GPU are to spare, and the plan is right to "
            f"{ACCURACY:.0%}; a smaller train.micro_batch, engine.recompute=full or a larger parallel.tensor need less"
        )
    return None
