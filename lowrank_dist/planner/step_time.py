"""A model of a step's time on a GPU: the times of GEMMs, passes over memory and messages, added up without overlap.

The time serves to compare layouts and is not a measurement. Kernels are assumed to be as good as those that the rates
were measured with; launches and stragglers are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lowrank_dist.planner.factors import gradients
from lowrank_dist.planner.flops import FlopCount, replicated_flops, square_lengths_of, step_flops
from lowrank_dist.planner.hardware import (
    GEMM_SHARE,
    LINK_SHARE,
    MEMORY_SHARE,
    NETWORK_LATENCY,
    NODE_LATENCY,
    Gpu,
)
from lowrank_dist.planner.job import Job, Layout
from lowrank_dist.planner.parameters import frozen_on_rank, partition_elements, theta_on_rank
from lowrank_dist.planner.traffic import Message, of_step

GEMMS, PASSES, TENSOR, DATA = "GEMMs", "memory", "tensor-parallel messages", "data-parallel messages"


@dataclass(frozen=True)
class StepTime:
    """Modelled seconds of an optimizer step by term, and its model FLOPs utilisation (0 to 1) over all GPUs."""

    terms: dict[str, float]
    mfu: float
    tokens_per_second: float

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def bound(self) -> str:
        """The term that takes longest."""
        return max(self.terms, key=lambda term: self.terms[term])


def job_flops(job: Job) -> FlopCount:
    """Return the FLOPs of one optimizer step on all ranks, with padding. `executed` includes work that ranks repeat."""
    layout = job.layout
    rows = layout.micro_batch * job.microbatches * layout.data
    tokens = rows * job.sequence_length
    flops = step_flops(
        job.architecture,
        job.footprint,
        tokens=tokens,
        target_tokens=rows * (job.targets // layout.micro_batch),
        square_lengths=square_lengths_of({job.sequence_length: rows}, job.architecture),
        recompute=layout.recompute,
    )
    once, cut = (job.microbatches * layout.data * count for count in job.footprint.microbatch_flops(job.architecture))
    repeated = (layout.tensor - 1) * once
    if not layout.sequence and layout.tensor > 1:
        more = replicated_flops(job.architecture, job.footprint, tokens=tokens, recompute=layout.recompute)
        repeated += (layout.tensor - 1) * more
    return replace(flops, executed=flops.executed + once + cut + repeated, model=flops.model + once + cut)


def step_time(job: Job, gpu: Gpu, gpus_per_node: int, tp_rank: int) -> StepTime:
    """Return the modelled time of one optimizer step."""
    flops = job_flops(job)
    ranks = job.layout.ranks
    messages = of_step(job, tp_rank)
    terms = {
        GEMMS: gemm_seconds(job, gpu, flops.executed / ranks),
        PASSES: _passes(job, tp_rank) / (gpu.bandwidth * MEMORY_SHARE),
        TENSOR: message_seconds((m for m in messages if m.group == "tensor"), job.layout, gpu, gpus_per_node),
        DATA: message_seconds((m for m in messages if m.group == "data"), job.layout, gpu, gpus_per_node),
    }
    seconds = sum(terms.values())
    rows = min(job.global_batch, job.layout.micro_batch * job.microbatches * job.layout.data)
    return StepTime(terms, flops.model / (seconds * ranks * gpu.flops), rows * job.length / seconds)


def gemm_seconds(job: Job, gpu: Gpu, flops: float) -> float:
    """Return the seconds of GEMMs: at the GEMM rate or, where microbatches are small, at the rate of reading weights.

    A microbatch reads the weights twice, three times with recomputation.
    """
    rate = gpu.flops * GEMM_SHARE * (1 if job.dtype == "bf16" else 0.5)  # TF32's rate is half
    reads = job.microbatches * job.itemsize * frozen_on_rank(job) * (3 if job.layout.recompute else 2)
    return max(flops / rate, reads / (gpu.bandwidth * MEMORY_SHARE))


def message_seconds(messages: Iterable[Message], layout: Layout, gpu: Gpu, gpus_per_node: int) -> float:
    """Return the seconds of messages in rings: a gather moves (N − 1)/N of its message, an all-reduce twice that.

    A group that crosses nodes uses the NICs of all its members on a node at once, as NCCL's rings do.
    """
    found = 0.0
    for message in messages:
        if message.group == "tensor":
            size, members = layout.tensor, min(layout.tensor, gpus_per_node)
            link = gpu.link(members)
        else:
            size, members = layout.data, min(layout.data, max(1, gpus_per_node // layout.tensor))
            link = gpu.link(members * layout.tensor)  # its members are not neighbours
        across = size > members
        bandwidth = min(link, gpu.network * members) if across else link
        moved = message.bytes * (size - 1) / size * (2 if message.kind == "all-reduce" else 1)
        latency = NETWORK_LATENCY if across else NODE_LATENCY
        found += message.count * (latency + moved / (bandwidth * LINK_SHARE))
    return found


def _passes(job: Job, tp_rank: int) -> int:
    """Return the bytes of passes outside the GEMMs: norms, residuals, activations, rotations, thin products.

    Backward reads and writes twice as much as forward. The six thin products of an adapted linear make three passes
    over its inputs and three over its outputs (benchmarks/roofline.py counts them one by one).
    """
    arch, n, e = job.architecture, job.layout.tensor, job.itemsize
    # Elements in forward: norms and residuals, with the method's passes over the latter.
    hidden = (2 * 2 + 2 * 3 + job.footprint.residual_passes) * arch.hidden * job.shard_tokens
    heads = 4 * (arch.heads + arch.kv_heads) * arch.head_dim // n * job.tokens
    messages = 4 * arch.hidden * job.tokens if job.layout.sequence else 0
    found = 0
    for layer, input_requires_grad, count in job.placement.kinds:
        inner = (3 if arch.gated else 2) * layer.kind.ffn // n * job.tokens
        forward = hidden + inner + heads + messages
        trained = any(gradients(layer, input_requires_grad).values()) or layer.adapted
        found += count * forward * (1 + 2 * trained + (trained and job.layout.recompute)) * e
        for linear, factors in layer.linears:
            if factors:
                inputs, outputs = linear.in_features, sum(factor.rows for factor in factors)
                column = linear.kind == "column"
                out_tokens = job.tokens / n if column else job.shard_tokens
                sides = inputs * (job.shard_tokens if column else job.tokens / n)
                sides += outputs * out_tokens
                found += int(count * 3 * sides * e)
                found += int(count * job.footprint.output_passes * outputs * out_tokens * e)
    head = 3 * 4 * job.targets * (arch.vocab // n) + 6 * job.tokens * arch.hidden * e
    theta = theta_on_rank(job, tp_rank)
    adam = 4 * 7 * sum(partition_elements(x, job.layout.data) for x in (theta.replicated, theta.sharded))
    return job.microbatches * (found + head) + adam + job.footprint.step_passes(job)
