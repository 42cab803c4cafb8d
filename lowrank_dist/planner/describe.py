"""Makes the plan of a chosen layout: everything that the report prints, as plain data (planner/result.py)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

from lowrank_dist.planner.choice import Choice, safer
from lowrank_dist.planner.factors import placement_without_factors
from lowrank_dist.planner.hardware import other_forms
from lowrank_dist.planner.job import Footprint, Job
from lowrank_dist.planner.layouts import Candidate, Cluster, tensor_sizes
from lowrank_dist.planner.memory import ACCURACY, memory, moments, persistent_bytes
from lowrank_dist.planner.parameters import (
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
from lowrank_dist.planner.result import (
    Change,
    Collectives,
    Files,
    Flops,
    Machines,
    MemoryOfGpu,
    MemoryPlan,
    MethodPlan,
    ModelSize,
    Plan,
    PlannedLayout,
    Setting,
    Share,
    State,
    TensorSizes,
    TimePlan,
    Trained,
    Workload,
)
from lowrank_dist.planner.step_time import job_flops
from lowrank_dist.planner.traffic import Message, bytes_of, calls, layer_calls, microbatch_messages, of_step

_LARGEST_TENSOR = 64  # the largest size that the plan lists as legal or not


def compare(candidate: Candidate, others: Iterable[Footprint]) -> list[MethodPlan]:
    """Return the candidate's own method as configured, then others that leave at least two positions per row."""
    job = candidate.job
    jobs = [replace(job, footprint=other) for other in others if job.length - other.virtual_positions >= 2]
    return [_method(candidate), *(_method(replace(candidate, job=other)) for other in jobs)]


def _method(candidate: Candidate) -> MethodPlan:
    job, arch = candidate.job, candidate.job.architecture
    frozen = replace(job, footprint=Footprint("frozen", placement_without_factors(arch, None)))
    theta = job.footprint.parameters(arch)
    return MethodPlan(
        method=job.footprint.name,
        placement=job.footprint.label(job),
        trained=theta.trained,
        stored=theta.stored,
        memory=candidate.memory.total,
        fits=candidate.missing_bytes == 0,
        added=layer_calls(job) - layer_calls(frozen),
        flops=job_flops(job).executed,
        seconds=_seconds(candidate),
        percent=100 * theta.trained / frozen_size(arch),
    )


def describe(
    planned: Choice,
    recommended: Choice | None,
    cluster: Cluster,
    others: Sequence[Footprint],
    keep_last: int | None,
    keep_best: int,
    settings: Sequence[Setting] = (),
    auto_tensor: int | None = None,
) -> Plan:
    """Return the plan of `planned`, and of the methods `others` on the same layout.

    recommended: the plan's own choice, where it differs from what the user has fixed. settings, auto_tensor: as in the
    plan.
    """
    candidate = planned.best
    job, flops = candidate.job, job_flops(candidate.job)
    remedies = list(planned.remedies)
    if candidate.tight and (safe := safer(candidate)) is not None:
        remedies.append(safe)
    return Plan(
        model=_model(job),
        workload=Workload(job.global_batch, job.length, job.target_share, job.packing, tuple(settings)),
        trained=_trained(job),
        files=_files(job, cluster, keep_last, keep_best),
        cluster=_machines(cluster),
        layout=_layout(candidate),
        fits=planned.fits,
        tight=candidate.tight,
        accuracy=ACCURACY,
        remedies=tuple(Change(remedy.words, _layout(remedy.candidate)) for remedy in remedies),
        runner_up=_layout(planned.runner_up) if planned.runner_up is not None else None,
        recommended=_layout(recommended.best) if recommended is not None else None,
        memory=MemoryPlan(_memory(candidate, recompute=False), _memory(candidate, recompute=True)),
        messages=_messages(candidate),
        flops=Flops(**asdict(flops), per_gpu=flops.executed // job.layout.ranks),
        time=_time(candidate) if job.device == "cuda" else None,
        tensor_sizes=_tensor(job, cluster),
        state=_state(job),
        methods=tuple(compare(candidate, others)),
        auto_tensor=auto_tensor,
    )


def _machines(cluster: Cluster) -> Machines:
    gpu = cluster.gpu
    size = (cluster.nodes, cluster.gpus_per_node, gpu.name, cluster.memory, cluster.usable)
    return Machines(*size, gpu.form, gpu.sold_as, tuple(other_forms(gpu)))


def _model(job: Job) -> ModelSize:
    arch = job.architecture
    layers, parameters = len(arch.layers), frozen_size(arch)
    return ModelSize(job.name, arch.family, layers, arch.hidden, job.dtype, parameters, frozen_parameters(arch))


def _trained(job: Job) -> Trained:
    footprint, size = job.footprint, frozen_size(job.architecture)
    theta = footprint.parameters(job.architecture)
    parts = footprint.parts(job.architecture)
    return Trained(
        method=footprint.name,
        parameters=theta.trained,
        stored=theta.stored,
        percent=100 * theta.trained / size,
        all_of_base=footprint.trains_base,
        by_module={name: Share(elements, 100 * elements / size) for name, elements in parts.items()},
    )


def _files(job: Job, cluster: Cluster, keep_last: int | None, keep_best: int) -> Files:
    return Files(
        adapter=adapter_bytes(job),
        adapter_16_bit=2 * job.footprint.parameters(job.architecture).stored,
        checkpoint=checkpoint_bytes(job),
        base=base_bytes(job),
        disk=disk_bytes(job, keep_last, keep_best),
        kept=None if keep_last is None else keep_last + keep_best,
        host_memory_loading=host_bytes(job, cluster.gpus_per_node),
        host_memory_saving=saving_bytes(job),
    )


def _layout(candidate: Candidate) -> PlannedLayout:
    layout = candidate.job.layout
    return PlannedLayout(
        tensor=layout.tensor,
        data=layout.data,
        sequence=layout.sequence,
        micro_batch=layout.micro_batch,
        recompute=layout.recompute,
        microbatches=candidate.job.microbatches,
        memory=candidate.memory.total,
        short=candidate.missing_bytes,
        spare=max(0, candidate.spare),
        crosses_nodes=candidate.crosses_nodes,
        seconds=_seconds(candidate),
    )


def _seconds(candidate: Candidate) -> float | None:
    """Return the modelled time of a step; None on CPUs, whose rates the model does not know."""
    return candidate.time.seconds if candidate.job.device == "cuda" else None


def _memory(candidate: Candidate, *, recompute: bool) -> MemoryOfGpu:
    """Return the parts at the fullest moment, and the total of every moment."""
    job = replace(candidate.job, layout=replace(candidate.job.layout, recompute=recompute))
    held = memory(job, candidate.tp_rank)
    always = sum(persistent_bytes(job, theta_on_rank(job, candidate.tp_rank)).values())
    totals = {moment.name: always + sum(moment.parts.values()) for moment in moments(job, candidate.tp_rank)}
    return MemoryOfGpu(held.total, held.moment, held.parts, totals)


def _messages(candidate: Candidate) -> tuple[Collectives, ...]:
    """Return the collectives of one rank, per microbatch and per optimizer step, by kind and group."""
    step, micro = of_step(candidate.job, candidate.tp_rank), microbatch_messages(candidate.job)
    return tuple(
        Collectives(kind, group, calls(micro)[kind, group], count, bytes_of(step)[kind, group])
        for (kind, group), count in sorted(calls(step).items())
    )


def messages_of(messages: Iterable[Message]) -> dict[str, dict[str, int]]:
    """Return calls and bytes by kind, of messages over one group."""
    held = list(messages)
    return {
        kind: {"calls": n, "bytes": bytes_of(held)[kind, group]} for (kind, group), n in sorted(calls(held).items())
    }


def _time(candidate: Candidate) -> TimePlan:
    time = candidate.time
    return TimePlan(True, time.seconds, time.terms, time.bound, time.mfu, time.tokens_per_second)


def _state(job: Job) -> State:
    """Return the bytes of weights, gradients, fp32 weights and moments of one replica, summed over its ranks.

    With full training the base itself is fp32.
    """
    size, theta = frozen_size(job.architecture), job.footprint.parameters(job.architecture)
    full = (4 + 4 + 12) * size
    planned = full if job.footprint.trains_base else job.itemsize * size + (4 + 4 + 12) * theta.trained
    return State(planned, planned / size, full, full / size)


def _tensor(job: Job, cluster: Cluster) -> TensorSizes:
    indivisible, legal = tensor_sizes(job.architecture, min(_LARGEST_TENSOR, cluster.gpus))
    illegal = {size: f"does not divide {reason}" for size, reason in indivisible.items()}
    illegal |= {size: f"does not divide {cluster.gpus} GPUs" for size in legal if cluster.gpus % size}
    return TensorSizes(tuple(size for size in legal if cluster.gpus % size == 0), illegal)
