"""The same job by the other methods: what they train, store, compute and send. Closed formulas.

    full       Φ itself (equation 1 of Hu et al., "LoRA", 2021): bf16 weights, fp32 gradients, masters and moments
    adapter_h  two bottlenecks a layer, after attention and MLP (Houlsby et al. 2019)
    adapter_l  one bottleneck a layer after the MLP, with a LayerNorm of its own (Lin et al. 2020)
    prefix     trained keys and values at l positions of every layer (Li & Liang 2021)
    prompt     trained embeddings at l positions of the input (Lester et al. 2021)

Under tensor parallelism a bottleneck is `sharded` (column then row: messages of its own, which nothing hides) or
`replicated` (no message; every rank stores and computes all of it).

Legend: H hidden, L layers, m bottleneck, l virtual positions, T tokens, N tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lowrank_dist.plan.hardware import GEMM_SHARE, usable
from lowrank_dist.plan.job import Job, padded_vocab
from lowrank_dist.plan.layouts import Candidate, Cluster
from lowrank_dist.plan.memory import PARTS, frozen_bytes, memory, saved_of_layer
from lowrank_dist.plan.parameters import frozen_on_rank, frozen_size
from lowrank_dist.plan.placement import Factor, Layer, Placement
from lowrank_dist.plan.shapes import Shape
from lowrank_dist.plan.step_time import job_flops, message_seconds, step_time
from lowrank_dist.plan.traffic import GATHER, REDUCE, SCATTER, Message
from lowrank_dist.plan.zero import partition_elements

METHODS = ("lora", "full", "adapter_h", "adapter_l", "prefix", "prompt")
_FROZEN: Layer = ((), (), (), ())
# What a trained linear saves is what an adapted one does without U: its input.
_INPUTS_SAVED: Layer = ((Factor("", 1, 0, 0, ()),),) * 4


@dataclass(frozen=True)
class Sizes:
    """bottleneck m; virtual positions l; width of the prefix' reparametrising MLP, None for none."""

    bottleneck: int = 64
    virtual: int = 32
    reparametrised: int | None = None


@dataclass(frozen=True)
class MethodPlan:
    """One method on the layout of the plan. added: collectives a layer, forward and backward, beside the frozen ones.

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


def adapter_parameters(shape: Shape, bottleneck: int, method: Literal["adapter_h", "adapter_l"]) -> int:
    """(2·H·m + m + H) for each bottleneck, and 2·H for each LayerNorm of adapter_l (Hu et al. 2021, section 5.1)."""
    bottlenecks = shape.layers * (2 if method == "adapter_h" else 1)
    norms = shape.layers if method == "adapter_l" else 0
    return bottlenecks * (2 * shape.hidden * bottleneck + bottleneck + shape.hidden) + norms * 2 * shape.hidden


def prefix_parameters(shape: Shape, virtual: int, reparametrised: int | None = None) -> int:
    """Keys and values, 2·L·l·(key/value heads × head width). While training with the MLP of width w: an embedding
    [l, H], and H → w → 2·L·(key/value width) with biases.
    """
    keys = 2 * shape.layers * shape.kv_heads * shape.head_dim
    if reparametrised is None:
        return virtual * keys
    return virtual * shape.hidden + (shape.hidden + 1) * reparametrised + (reparametrised + 1) * keys


def prompt_parameters(shape: Shape, virtual: int) -> int:
    """l·H."""
    return virtual * shape.hidden


def compare(candidate: Candidate, sizes: Sizes) -> list[MethodPlan]:
    """Every method on the candidate's layout; low-rank updates, as they are configured, first."""
    job, time = candidate.job, candidate.time
    placement = job.placement
    lora = MethodPlan(
        "lora",
        "",
        placement.elements,
        placement.elements,
        candidate.memory.total,
        candidate.short == 0,
        0,
        job_flops(job).executed,
        time.seconds,
    )
    return [lora, _full(candidate), *_adapters(candidate, sizes), *_virtual(candidate, sizes)]


def _full(candidate: Candidate) -> MethodPlan:
    """All of Φ. Under sequence parallelism Megatron gathers a column linear's input again for its weight's gradient."""
    job, cluster = candidate.job, candidate.cluster
    layout, on_rank = job.layout, frozen_on_rank(job)
    layer = saved_of_layer(job, _INPUTS_SAVED, True)
    boundary = job.shard_tokens * job.shape.hidden * job.itemsize
    activations = job.shape.layers * boundary + layer if layout.recompute else job.shape.layers * layer
    # What autograd keeps of the head, now trained: logits and their gradient in fp32 and the base's dtype.
    logits = job.targets * padded_vocab(job) // layout.tensor * (4 + 2 * job.itemsize)
    states = 4 * on_rank + 12 * partition_elements(on_rank, layout.data) + 4 * min(on_rank, 5 * 10**8)
    total = frozen_bytes(job) + states + activations + logits
    base = job_flops(_frozen_job(job))
    rows = layout.micro_batch * job.microbatches * layout.data
    gradients = 2 * rows * job.sequence_length * job.shape.layers * job.shape.layer_weights
    head = 2 * rows * (job.targets // layout.micro_batch) * job.shape.vocab * job.shape.hidden
    flops = base.executed + gradients + head
    again = 2 if layout.sequence and layout.tensor > 1 else 0
    whole = job.tokens * job.shape.hidden * job.itemsize
    extra = [Message(GATHER, "tensor", "backward", whole, again * job.shape.layers * job.microbatches)]
    exchanged = [
        Message(REDUCE, "data", "step", 4 * on_rank),
        Message(GATHER, "data", "step", job.itemsize * on_rank),
    ]
    seconds = _seconds(candidate, flops, extra if again else [], exchanged if layout.data > 1 else [])
    size = frozen_size(job.shape)
    return MethodPlan("full", "", size, size, total, _fits(total, cluster), again, flops, seconds)


def _adapters(candidate: Candidate, sizes: Sizes) -> Iterator[MethodPlan]:
    job, cluster = candidate.job, candidate.cluster
    shape, layout, m = job.shape, job.layout, sizes.bottleneck
    rows = layout.micro_batch * job.microbatches * layout.data
    base = job_flops(_frozen_job(job))
    for method in ("adapter_h", "adapter_l"):
        trained = adapter_parameters(shape, m, method)
        bottlenecks = 2 if method == "adapter_h" else 1
        # Forward, dX and dW of both products of every bottleneck.
        once = shape.layers * bottlenecks * 2 * 2 * shape.hidden * m * rows * job.sequence_length
        for placed in ("sharded", "replicated") if layout.tensor > 1 else ("replicated",):
            sharded = placed == "sharded"
            n = layout.tensor if sharded else 1
            on_rank = trained // n
            saved_tokens = job.shard_tokens
            inner = (job.tokens if sharded else saved_tokens) * m // n
            saved = bottlenecks * (saved_tokens * shape.hidden + 2 * inner) * job.itemsize
            total = _with_theta(job, on_rank, saved)
            added = _added(job, bottlenecks) if sharded else 0
            repeated = 1 if sharded or layout.sequence else layout.tensor
            flops = base.executed + once * (3 + layout.recompute) * repeated
            seconds = _seconds(candidate, flops, list(_own_messages(job, bottlenecks)) if sharded else [], [])
            yield MethodPlan(method, placed, trained, trained, total, _fits(total, cluster), added, flops, seconds)


def _added(job: Job, bottlenecks: int) -> int:
    """A column then a row linear: a gather and a scatter each way, or without sequence parallelism one reduction.

    Recomputation repeats those of forward: of the last bottleneck all but its own last call, and fc2's before it.
    """
    return bottlenecks * (2 if job.layout.sequence else 1) * (2 + job.layout.recompute)


def _own_messages(job: Job, bottlenecks: int) -> Iterator[Message]:
    whole = job.tokens * job.shape.hidden * job.itemsize
    count = bottlenecks * job.shape.layers * job.microbatches
    for phase in ("forward", "backward") + ("backward",) * job.layout.recompute:
        for kind in (GATHER, SCATTER) if job.layout.sequence else (REDUCE,):
            yield Message(kind, "tensor", phase, whole, count)


def _virtual(candidate: Candidate, sizes: Sizes) -> Iterator[MethodPlan]:
    """prefix and prompt. A prefix is l more keys and values in attention; a prompt is l more tokens everywhere."""
    job, cluster = candidate.job, candidate.cluster
    shape, layout, length = job.shape, job.layout, sizes.virtual
    rows = layout.micro_batch * job.microbatches * layout.data
    stored, trained = prefix_parameters(shape, length), prefix_parameters(shape, length, sizes.reparametrised)
    heads = shape.heads * shape.head_dim
    saved = 2 * layout.micro_batch * length * max(1, shape.kv_heads // layout.tensor) * shape.head_dim * job.itemsize
    total = _with_theta(job, trained // layout.tensor, saved)
    # Each of the row's tokens meets l more keys: two products forward, five backward.
    attention = shape.layers * 2 * 2 * rows * job.sequence_length * length * heads
    flops = job_flops(_frozen_job(job)).executed + attention * (2 + 5 + 2 * layout.recompute) // 2
    seconds = _seconds(candidate, flops, [], [])
    yield MethodPlan("prefix", "heads", trained, stored, total, _fits(total, cluster), 0, flops, seconds)
    longer = _frozen_job(replace(job, length=job.length + length))
    count = prompt_parameters(shape, length)
    total = _with_theta(longer, count, 0)
    flops = job_flops(longer).executed
    yield MethodPlan(
        "prompt", "replicated", count, count, total, _fits(total, cluster), 0, flops, _seconds(candidate, flops, [], [])
    )


def _with_theta(job: Job, on_rank: int, saved: int) -> int:
    """Bytes at the fullest moment with `on_rank` parameters trained beside a base that all gradients flow through."""
    frozen = memory(_frozen_job(job), 0)
    kept = saved if job.layout.recompute else saved * job.shape.layers
    states = 4 * 2 * on_rank + 12 * partition_elements(on_rank, job.layout.data) + 4 * on_rank
    return sum(frozen.parts[part] for part in PARTS) + states + kept


def _frozen_job(job: Job) -> Job:
    """The job without factors, whose layers all send a gradient down: what every other method trains inside of."""
    return replace(job, placement=Placement((_FROZEN,) * job.shape.layers, flows=True))


def _fits(total: int, cluster: Cluster) -> bool:
    return total <= usable(cluster.memory)


def _seconds(candidate: Candidate, flops: int, extra: list[Message], exchanged: list[Message]) -> float:
    """The low-rank job's step with other GEMMs and other messages."""
    job, gpu, node = candidate.job, candidate.cluster.gpu, candidate.cluster.gpus_per_node
    frozen = step_time(_frozen_job(job), gpu, node, 0).terms
    rate = gpu.flops * GEMM_SHARE * job.layout.ranks
    more = max(0, flops - job_flops(_frozen_job(job)).executed) / rate
    return sum(frozen.values()) + more + message_seconds([*extra, *exchanged], job.layout, gpu, node)
