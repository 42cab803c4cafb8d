"""The same job by every method: what it trains, stores, computes and sends, by the formulas of the plan itself.

Under tensor parallelism a bottleneck is `sharded` (column then row: messages of its own, which nothing hides) or
`replicated` (no message; every rank stores and computes all of it).

Legend: H hidden, L layers, m bottleneck, l virtual positions, w width of the prefix' MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.plan.factors import joined, on_every_linear
from lowrank_dist.plan.job import Job, Tuning
from lowrank_dist.plan.layouts import Candidate
from lowrank_dist.plan.parameters import frozen_size
from lowrank_dist.plan.step_time import job_flops
from lowrank_dist.plan.traffic import layer_calls

METHODS = ("lora", "full", "adapter_h", "adapter_l", "prefix", "prompt")


@dataclass(frozen=True)
class Sizes:
    """Of the methods beside the planned one: rank of factors on every linear; bottleneck m; virtual positions l; width
    of the prefix' reparametrising MLP, None for none.
    """

    rank: int = 8
    bottleneck: int = 64
    virtual: int = 32
    reparametrised: int | None = None


@dataclass(frozen=True)
class MethodPlan:
    """One method on the layout of the plan. added: collectives a layer, forward and backward, beside those of a frozen
    layer that sends a gradient down.

    trained: while training (with the prefix' MLP); stored: in the adapter. flops: executed in a step by all GPUs.
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


def adapter_parameters(arch: Architecture, bottleneck: int, method: Literal["adapter_h", "adapter_l"]) -> int:
    """(2·H·m + m + H) for each bottleneck, and 2·H for each LayerNorm of adapter_l (Hu et al. 2021, section 5.1)."""
    bottlenecks = arch.layers * (2 if method == "adapter_h" else 1)
    norms = arch.layers if method == "adapter_l" else 0
    return bottlenecks * (2 * arch.hidden * bottleneck + bottleneck + arch.hidden) + norms * 2 * arch.hidden


def prefix_parameters(arch: Architecture, virtual: int, reparametrised: int | None = None) -> int:
    """Keys and values, 2·L·l·(key/value heads × head width). While training with the MLP of width w: an embedding
    [l, H], and H → w → 2·L·(key/value width) with biases.
    """
    keys = 2 * arch.layers * arch.kv_heads * arch.head_dim
    if reparametrised is None:
        return virtual * keys
    return virtual * arch.hidden + (arch.hidden + 1) * reparametrised + (reparametrised + 1) * keys


def prompt_parameters(arch: Architecture, virtual: int) -> int:
    """l·H."""
    return virtual * arch.hidden


def trained_parameters(job: Job) -> int:
    """|Θ| while it is trained, unsharded: with the MLP of a prefix."""
    tuning, arch = job.tuning, job.architecture
    if tuning.method == "lora":
        return job.placement.elements
    if tuning.method == "full":
        return frozen_size(arch)
    if tuning.method == "prefix":
        return prefix_parameters(arch, tuning.virtual, tuning.width)
    return stored_parameters(job)


def stored_parameters(job: Job) -> int:
    """|Θ| as others load it: a prefix without its MLP."""
    tuning, arch = job.tuning, job.architecture
    if tuning.method in ("adapter_h", "adapter_l"):
        return adapter_parameters(arch, tuning.bottleneck, tuning.method)
    if tuning.method == "prefix":
        return prefix_parameters(arch, tuning.virtual)
    if tuning.method == "prompt":
        return prompt_parameters(arch, tuning.virtual)
    return trained_parameters(job)


def compare(candidate: Candidate, sizes: Sizes) -> list[MethodPlan]:
    """The candidate's own method as it is configured, then every other on the same layout."""
    job = candidate.job
    return [_plan(candidate), *(_plan(replace(candidate, job=other)) for other in _others(job, sizes))]


def _others(job: Job, sizes: Sizes) -> Iterator[Job]:
    tensor, own = job.layout.tensor, job.tuning
    placements = [False] if tensor == 1 else [True, False] if sizes.bottleneck % tensor == 0 else [False]
    tunings = [Tuning("lora"), Tuning("full")]
    for method in ("adapter_h", "adapter_l"):
        tunings += [Tuning(method, bottleneck=sizes.bottleneck, sharded=sharded) for sharded in placements]
    tunings += [
        Tuning("prefix", virtual=sizes.virtual, width=sizes.reparametrised),
        Tuning("prompt", virtual=sizes.virtual),
    ]
    for tuning in tunings:
        if tuning.method == own.method and (not own.bottlenecks or tensor == 1 or tuning.sharded == own.sharded):
            continue
        if job.length - tuning.virtual < 2:
            continue
        if tuning.method == own.method:
            tuning = replace(own, sharded=tuning.sharded)
        placement = (
            on_every_linear(job.architecture, sizes.rank)
            if tuning.method == "lora"
            else joined(job.architecture, tuning.method)
        )
        yield replace(job, tuning=tuning, placement=placement)


def _plan(candidate: Candidate) -> MethodPlan:
    job, tuning = candidate.job, candidate.job.tuning
    placement = {"prefix": "heads", "prompt": "replicated"}.get(tuning.method, "")
    if tuning.bottlenecks:
        placement = "sharded" if tuning.sharded and job.layout.tensor > 1 else "replicated"
    return MethodPlan(
        tuning.method,
        placement,
        trained_parameters(job),
        stored_parameters(job),
        candidate.memory.total,
        candidate.short == 0,
        layer_calls(job)
        - layer_calls(replace(job, tuning=Tuning("prompt"), placement=joined(job.architecture, "prompt"))),
        job_flops(job).executed,
        candidate.time.seconds,
    )
