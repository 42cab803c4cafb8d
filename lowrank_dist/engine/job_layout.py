"""The layout of a job on its nodes, planned before the job is submitted. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowrank_dist.engine.planning import Request, fixed_of, job_of
from lowrank_dist.errors import UserError
from lowrank_dist.plan.hardware import usable
from lowrank_dist.plan.job import Job
from lowrank_dist.plan.layouts import Candidate, Cluster, Fixed, choose

# Share of planned memory by which a measured peak may exceed the plan.
_ACCURACY = 0.05


@dataclass(frozen=True)
class JobLayout:
    """A planned layout.

    chosen: overrides for the keys that config and command line leave open. warning: None where memory surely suffices.
    """

    candidate: Candidate
    chosen: tuple[str, ...]
    warning: str | None

    @property
    def nodes(self) -> str:
        cluster = self.candidate.cluster
        return f"{cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu.name}"

    def __str__(self) -> str:
        job, cluster = self.candidate.job, self.candidate.cluster
        planned = f"{self.candidate.memory.total / 1e9:.1f}"
        if job.device == "cpu":
            return f"{job.layout}; {planned} GB of memory a rank"
        available = f"{usable(cluster.memory) / 1e9:.1f} usable GB of each {cluster.gpu.name}"
        return f"{job.layout}; {planned} of {available}, {self.candidate.time.seconds:.3g} s a step"


def job_layout(request: Request, cluster: Cluster) -> JobLayout:
    """Return the fastest layout that fits the cluster and agrees with all that config and command line say.

    Every row is assumed to have data.max_length tokens, all of them targets. A CPU run takes the whole layout from its
    config. Raises UserError where no layout fits, with one that does as the remedy, and where a tensor-parallel group
    would cross nodes without parallel.across_nodes. With train.ignore_plan, lack of memory is a warning.
    """
    config, job = request.config, job_of(request, 1.0)
    fixed = fixed_of(replace(request, whole=job.device == "cpu"))
    try:
        choice = choose(job, fixed, cluster)
    except UserError as error:
        raise UserError(f"{error}{_fitting_layout(job, fixed, cluster)}") from error
    best, short = choice.best, choice.best.missing_bytes / 1e9
    layout = best.job.layout
    where = f"{cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu.name}"
    if not choice.fits and not config.train.ignore_plan:
        remedy = _fitting_layout(job, fixed, cluster) or f"; it would fit with {'; '.join(choice.remedies)}"
        raise UserError(f"{request.model.name} does not fit {where} as {layout}: a GPU lacks {short:.1f} GB{remedy}")
    if crosses_nodes(best) and not config.parallel.across_nodes:
        raise UserError(
            f"parallel.across_nodes is false, but on {where} the layout {layout} puts a tensor-parallel group on "
            f"several nodes, where every layer waits for the network{_fitting_layout(job, fixed, cluster)}"
        )
    return JobLayout(best, tuple(_overrides(best, request)), _warning(best, where))


def crosses_nodes(candidate: Candidate) -> bool:
    """Return whether a tensor-parallel group of consecutive ranks lies on more than one node."""
    return candidate.cluster.gpus_per_node % candidate.job.layout.tensor != 0


def _fitting_layout(job: Job, fixed: Fixed, cluster: Cluster) -> str:
    """Return the remedy that names the fastest layout that fits these nodes; empty where none does."""
    try:
        choice = choose(job, Fixed(sequence=fixed.sequence), cluster)
    except UserError:
        return ""
    if not choice.fits:
        return ""
    keys = [f"{key}={value}" for key, value in _values(choice.best).items()]
    keys += ["parallel.data=null"] * (fixed.data not in (None, choice.best.job.layout.data))
    keys += ["parallel.across_nodes=true"] * crosses_nodes(choice.best)
    return f"; these nodes fit it with {' '.join(keys)}"


def _overrides(candidate: Candidate, request: Request) -> list[str]:
    """Return the candidate's values of the keys that the request leaves open."""
    if candidate.job.device == "cpu":
        return []
    config = request.config
    given = {
        f"{name}.{key}" for name in ("parallel", "train", "engine") for key in getattr(config, name).model_fields_set
    }
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
        missing = candidate.missing_bytes / 1e9
        return f"the plan lacks {missing:.1f} GB on each GPU of {where}; train.ignore_plan=true starts it"
    spare = usable(candidate.cluster.memory) - candidate.memory.total
    if candidate.job.device == "cuda" and spare < _ACCURACY * candidate.memory.total:
        return (
            f"memory is tight: {spare / 1e9:.2f} GB of each GPU are to spare, and the plan is right to "
            f"{_ACCURACY:.0%}; a smaller train.micro_batch, engine.recompute=full or a larger parallel.tensor need less"
        )
    return None
