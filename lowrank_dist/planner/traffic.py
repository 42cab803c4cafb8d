"""The collectives of an optimizer step: their number, kind, group and bytes.

Bytes are those of the whole message, as in parallel/counting.py: a gather's output, a reduction's input. The scalars
that every distributed optimizer exchanges (norm, overflow, loss) are left out.

Legend: T tokens of a microbatch, H hidden, R = Σ r of a linear, n target tokens, N tensor-parallel ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from lowrank_dist.arch.rows import Linear
from lowrank_dist.planner.factors import Layer, gradients, total_rank
from lowrank_dist.planner.job import Call, Job, padded_vocab
from lowrank_dist.planner.parameters import bucket_elements, partition_elements, theta_on_rank

GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
# parallel/vocab.py limits a block of fp32 logits to 128 MiB.
_LOGIT_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Message:
    """`count` calls of `bytes` each. phase: forward or backward of one microbatch, or the step at the end."""

    kind: str
    group: Literal["tensor", "data"]
    phase: Literal["forward", "backward", "step"]
    bytes: int
    count: int = 1


def logit_block(job: Job) -> int:
    """Return the number of positions in a block of logits.

    It is computed from the padded rows, whose number is the same on every rank: blocks are all-reduced, so all ranks
    must use the same blocks.
    """
    return max(1, _LOGIT_BYTES // (4 * (padded_vocab(job) // job.layout.tensor)))


def microbatch_messages(job: Job) -> list[Message]:
    """Return the tensor-parallel messages of one microbatch, forward and backward."""
    if job.layout.tensor == 1:
        return []
    messages = [*_ends(job)]
    for layer, input_requires_grad, count in job.placement.kinds:
        for phase, kind, nbytes in _layer(job, layer, input_requires_grad):
            messages.append(Message(kind, "tensor", phase, nbytes, count))
    return messages


def layer_calls(job: Job) -> int:
    """Return the number of collectives that the topmost layer issues in a microbatch."""
    return 0 if job.layout.tensor == 1 else sum(1 for _ in _layer(job, *job.placement.top))


def step_messages(job: Job, tp_rank: int) -> list[Message]:
    """Return the messages that an optimizer step adds to its microbatches'.

    They are the deferred sum of partial gradients, those of ZeRO over data parallelism, and the method's own.
    """
    theta = theta_on_rank(job, tp_rank)
    if not theta.elements:
        return []
    messages, data = [], job.layout.data
    if job.layout.tensor > 1 and theta.replicated:
        nbytes = 4 * partition_elements(theta.replicated, data)
        messages.append(Message(REDUCE, "tensor", "step", nbytes))
    if job.layout.tensor > 1:
        messages += [Message(kind, "tensor", "step", nbytes) for kind, nbytes in job.footprint.step_calls(job)]
    if data > 1:
        rounds = job.microbatches if job.zero_stage == 2 else 1
        for elements in bucket_elements(job, tp_rank):
            messages.append(Message(REDUCE, "data", "step", 4 * elements, rounds))
        for elements in (theta.replicated, theta.sharded):
            if elements:
                messages.append(Message(GATHER, "data", "step", 4 * data * partition_elements(elements, data)))
    return messages


def of_step(job: Job, tp_rank: int) -> list[Message]:
    """Return all messages of one optimizer step on a rank."""
    repeated = [
        Message(m.kind, m.group, m.phase, m.bytes, m.count * job.microbatches) for m in microbatch_messages(job)
    ]
    return repeated + step_messages(job, tp_rank)


def calls(messages: Iterable[Message]) -> Counter[tuple[str, str]]:
    """Return the calls by (kind, group)."""
    found: Counter[tuple[str, str]] = Counter()
    for message in messages:
        found[message.kind, message.group] += message.count
    return found


def bytes_of(messages: Iterable[Message]) -> Counter[tuple[str, str]]:
    """Return the bytes by (kind, group)."""
    found: Counter[tuple[str, str]] = Counter()
    for message in messages:
        found[message.kind, message.group] += message.count * message.bytes
    return found


def _ends(job: Job) -> Iterator[Message]:
    """Yield the messages of embedding and head."""
    arch, layout = job.architecture, job.layout
    whole = job.tokens * arch.hidden * job.itemsize
    # With learned positions Megatron all-reduces the word embeddings and shards the sum afterwards.
    scattered = layout.sequence and not arch.position_rows
    yield Message(SCATTER if scattered else REDUCE, "tensor", "forward", whole)
    if layout.sequence and job.footprint.gathers_embedding_gradient(job):
        yield Message(GATHER, "tensor", "backward", whole)
    if layout.sequence:
        yield Message(GATHER, "tensor", "forward", whole)
        if job.placement.trains:
            yield Message(SCATTER, "tensor", "backward", whole)
    elif job.placement.trains:
        yield Message(REDUCE, "tensor", "backward", job.targets * arch.hidden * job.itemsize)
    block = logit_block(job)
    full, rest = divmod(job.targets, block)
    for positions, count in ((block, full), (rest, 1)):
        if positions and count:
            yield Message(REDUCE, "tensor", "forward", 4 * positions, count)  # maximum
            yield Message(REDUCE, "tensor", "forward", 8 * positions, count)  # Σ exp and the target's logit


def _layer(
    job: Job, layer: Layer, input_requires_grad: bool
) -> Iterator[tuple[Literal["forward", "backward"], str, int]]:
    """Yield (phase, kind, bytes) of a layer's calls."""
    arch, sequence, footprint = job.architecture, job.layout.sequence, job.footprint
    unit = job.tokens * job.itemsize
    own = footprint.layer_calls(job, input_requires_grad)
    fused = unit * layer.kind.linears["linear_qkv"].out_features
    # Megatron gathers q, k, v where a rank's rows are not whole heads.
    gathered = [(GATHER, fused)] if arch.kv_heads < job.layout.tensor else []
    # The sums of squares of q and k, in fp32.
    over_heads = [(REDUCE, 8 * job.tokens)] if layer.kind.norms_all_heads else []
    attention: list[Call] = []
    mlp: list[Call] = []
    for linear, factors in layer.linears:
        part = attention if linear.in_attention else mlp
        part += _forward(job, linear, total_rank(factors))
        if linear.interleave == "qkv":
            part += gathered + over_heads
    forward = [*attention, *own.behind_attention, *mlp, *own.behind_mlp]
    yield from (("forward", *call) for call in forward)
    if not (input_requires_grad or layer.adapted):
        return
    if job.layout.recompute:
        # Non-reentrant recomputation stops at the last saved tensor. The layer's last reduction comes after it, unless
        # the method or a norm saves a tensor behind that reduction.
        last_again = own.last_again or layer.kind.has("post_mlp_layernorm")
        yield from (("backward", *call) for call in (forward if last_again else forward[:-1]))
    for (linear, factors), needs_dx in zip(layer.linears, gradients(layer, input_requires_grad).values(), strict=True):
        column = linear.kind == "column"
        # The lowest adapted linear needs no dX: its dU is the whole message.
        columns = arch.hidden * needs_dx + total_rank(factors)
        if sequence and columns:
            yield "backward", SCATTER if column else GATHER, unit * columns
        elif not sequence and needs_dx and column:
            yield "backward", REDUCE, unit * arch.hidden
        if sequence and footprint.trains_base and column:
            # Megatron saves the shard of a column linear's input and gathers it again for its weight's gradient.
            yield "backward", GATHER, unit * arch.hidden
    yield from (("backward", *call) for call in own.backward)
    if input_requires_grad or layer.total_rank("linear_qkv"):
        yield from (("backward", *call) for call in over_heads)
        if gathered:
            yield "backward", SCATTER, fused


def _forward(job: Job, linear: Linear, rank: int) -> list[Call]:
    """Return the call that a linear issues in forward, if any. rank: R of its factors."""
    unit, hidden, column = job.tokens * job.itemsize, job.architecture.hidden, linear.kind == "column"
    if job.layout.sequence:
        return [(GATHER if column else SCATTER, unit * (hidden + rank))]
    return [] if column else [(REDUCE, unit * hidden)]
