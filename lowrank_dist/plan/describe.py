"""The whole plan as plain data, for --json and the tables. Sizes are in bytes, times in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lowrank_dist.plan.factors import placement_without_factors
from lowrank_dist.plan.hardware import usable
from lowrank_dist.plan.job import Footprint, Job
from lowrank_dist.plan.layouts import Candidate, Choice, Cluster, tensor_sizes
from lowrank_dist.plan.memory import memory, moments, persistent_bytes
from lowrank_dist.plan.parameters import (
    adapter_bytes,
    base_bytes,
    checkpoint_bytes,
    disk_bytes,
    frozen_parameters,
    frozen_size,
    host_bytes,
    saving_bytes,
    theta_on_rank,
)
from lowrank_dist.plan.step_time import job_flops
from lowrank_dist.plan.traffic import Message, bytes_of, calls, layer_calls, microbatch_messages, of_step

_LARGEST_TENSOR = 64  # the largest size that the plan lists as legal or not


@dataclass(frozen=True)
class MethodPlan:
    """One method on the layout of the plan.

    trained: elements while training; stored: elements in the adapter. added: collectives per layer, forward and
    backward, beyond those of a frozen layer that passes a gradient down. flops: executed in a step by all GPUs.
    """

    method: str
    placement: str
    trained: int
    stored: int
    memory: int
    fits: bool
    added: int
    flops: int
    seconds: float


def compare(candidate: Candidate, others: Iterable[Footprint]) -> list[MethodPlan]:
    """Return the candidate's own method as configured, then the others that leave a row at least two positions."""
    job = candidate.job
    jobs = [replace(job, footprint=other) for other in others if job.length - other.virtual_positions >= 2]
    return [_plan(candidate), *(_plan(replace(candidate, job=other)) for other in jobs)]


def _plan(candidate: Candidate) -> MethodPlan:
    job, arch = candidate.job, candidate.job.architecture
    frozen = replace(job, footprint=Footprint("frozen", placement_without_factors(arch, None)))
    theta = job.footprint.parameters(arch)
    return MethodPlan(
        job.footprint.name,
        job.footprint.label(job),
        theta.trained,
        theta.stored,
        candidate.memory.total,
        candidate.missing_bytes == 0,
        layer_calls(job) - layer_calls(frozen),
        job_flops(job).executed,
        candidate.time.seconds,
    )


def describe(
    planned: Choice,
    recommended: Choice | None,
    cluster: Cluster,
    others: Sequence[Footprint],
    keep_last: int | None,
    keep_best: int,
) -> dict[str, Any]:
    """Return the data of `planned`, and of the methods `others` on the same layout.

    recommended: the plan's own choice, where it differs from what the user has fixed.
    """
    candidate = planned.best
    job = candidate.job
    return {
        "model": _model(job),
        "trained": _trained(job),
        "files": _files(job, cluster, keep_last, keep_best),
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "gpu": cluster.gpu.name,
            "memory": cluster.memory,
            "usable": usable(cluster.memory),
        },
        "layout": _layout(candidate),
        "fits": planned.fits,
        "remedies": list(planned.remedies),
        "runner_up": _layout(planned.runner_up) if planned.runner_up is not None else None,
        "recommended": _layout(recommended.best) if recommended is not None else None,
        "memory": _memory(candidate),
        "messages": _messages(candidate),
        "flops": asdict(job_flops(job)) | {"per_gpu": job_flops(job).executed // job.layout.ranks},
        "time": _time(candidate) if job.device == "cuda" else None,
        "tensor_sizes": _tensor(job, cluster),
        "state": _state(job),
        "methods": [_method(plan, job) for plan in compare(candidate, others)],
    }


def _model(job: Job) -> dict[str, Any]:
    arch = job.architecture
    return {
        "name": job.name,
        "family": arch.family,
        "layers": len(arch.layers),
        "hidden": arch.hidden,
        "dtype": job.dtype,
        "parameters": frozen_size(arch),
        "parameters_by_part": frozen_parameters(arch),
    }


def _trained(job: Job) -> dict[str, Any]:
    footprint, size = job.footprint, frozen_size(job.architecture)
    theta = footprint.parameters(job.architecture)
    return {
        "method": footprint.name,
        "parameters": theta.trained,
        "stored": theta.stored,
        "percent": 100 * theta.trained / size,
        "by_module": {
            name: {"parameters": elements, "percent": 100 * elements / size}
            for name, elements in footprint.parts(job.architecture).items()
        },
    }


def _files(job: Job, cluster: Cluster, keep_last: int | None, keep_best: int) -> dict[str, int]:
    return {
        "adapter": adapter_bytes(job),
        "adapter_16_bit": 2 * job.footprint.parameters(job.architecture).stored,
        "checkpoint": checkpoint_bytes(job),
        "base": base_bytes(job),
        "disk": disk_bytes(job, keep_last, keep_best),
        "host_memory_loading": host_bytes(job, cluster.gpus_per_node),
        "host_memory_saving": saving_bytes(job),
    }


def _layout(candidate: Candidate) -> dict[str, Any]:
    layout = candidate.job.layout
    found = {
        "tensor": layout.tensor,
        "data": layout.data,
        "sequence": layout.sequence,
        "micro_batch": layout.micro_batch,
        "recompute": layout.recompute,
        "microbatches": candidate.job.microbatches,
        "memory": candidate.memory.total,
        "short": candidate.missing_bytes,
    }
    return found | ({"seconds": candidate.time.seconds} if candidate.job.device == "cuda" else {})


def _memory(candidate: Candidate) -> dict[str, Any]:
    """Return the memory with and without recomputation: parts at the fullest moment, and the total of every moment."""
    found = {}
    for name, recompute in (("without_recompute", False), ("with_recompute", True)):
        layout = replace(candidate.job.layout, recompute=recompute)
        job = replace(candidate.job, layout=layout)
        held = memory(job, candidate.tp_rank)
        always = sum(persistent_bytes(job, theta_on_rank(job, candidate.tp_rank)).values())
        found[name] = {
            "total": held.total,
            "moment": held.moment,
            "parts": held.parts,
            "moments": {m.name: always + sum(m.parts.values()) for m in moments(job, candidate.tp_rank)},
        }
    return found


def _messages(candidate: Candidate) -> list[dict[str, Any]]:
    """Return the messages of one rank, per microbatch and per optimizer step, by kind and group."""
    step, micro = of_step(candidate.job, candidate.tp_rank), microbatch_messages(candidate.job)
    return [
        {
            "kind": kind,
            "group": group,
            "calls_per_microbatch": calls(micro)[kind, group],
            "calls": count,
            "bytes": bytes_of(step)[kind, group],
        }
        for (kind, group), count in sorted(calls(step).items())
    ]


def messages_of(messages: Iterable[Message]) -> dict[str, dict[str, int]]:
    """Return calls and bytes by kind, of messages over one group."""
    held = list(messages)
    return {
        kind: {"calls": n, "bytes": bytes_of(held)[kind, group]} for (kind, group), n in sorted(calls(held).items())
    }


def _time(candidate: Candidate) -> dict[str, Any]:
    time = candidate.time
    return {
        "modelled": True,
        "seconds": time.seconds,
        "terms": time.terms,
        "bound": time.bound,
        "mfu": time.mfu,
        "tokens_per_second": time.tokens_per_second,
    }


def _state(job: Job) -> dict[str, float]:
    """Return the bytes of weights, gradients, masters and moments of one replica, summed over its ranks.

    planned: with the job's method; full: with full training, where Φ itself is fp32.
    """
    size, theta = frozen_size(job.architecture), job.footprint.parameters(job.architecture)
    full = (4 + 4 + 12) * size
    planned = full if job.footprint.trains_base else job.itemsize * size + (4 + 4 + 12) * theta.trained
    return {
        "planned": planned,
        "planned_bytes_per_parameter": planned / size,
        "full": full,
        "full_bytes_per_parameter": full / size,
    }


def _tensor(job: Job, cluster: Cluster) -> dict[str, Any]:
    largest = min(_LARGEST_TENSOR, cluster.gpus)
    illegal, legal = tensor_sizes(job.architecture, largest)
    return {
        "legal": [size for size in legal if cluster.gpus % size == 0],
        "not": {size: f"does not divide {reason}" for size, reason in illegal.items()}
        | {size: f"does not divide {cluster.gpus} GPUs" for size in legal if cluster.gpus % size},
    }


def _method(plan: MethodPlan, job: Job) -> dict[str, Any]:
    found = asdict(plan) | {"percent": 100 * plan.trained / frozen_size(job.architecture)}
    if job.device == "cpu":
        del found["seconds"]
    return found
