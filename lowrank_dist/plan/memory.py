"""Memory of one GPU (or of one rank on a CPU) at the fullest moment of a step, by part.

What lives for the whole run is counted exactly. Activations are what autograd saves (parallel/autograd.py,
model/layers.py, model/attention.py, model/gpt.py). Beside them the largest of a few moments decides: the vocabulary
projection, the gradient that comes back from it, the MLP's backward of the topmost layer, and the optimizer's step.

Legend: T tokens of a microbatch, T_j on a rank outside attention and MLP, H hidden, F ffn, N tensor-parallel ranks,
R = Σ r of a linear, n target tokens, e bytes of an element of the base.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_dist.plan.job import Job, head_rows
from lowrank_dist.plan.parameters import ThetaOnRank, frozen_on_rank, theta_on_rank
from lowrank_dist.plan.placement import Layer, gradients, total_rank
from lowrank_dist.plan.shapes import LINEARS
from lowrank_dist.plan.traffic import logit_block
from lowrank_dist.plan.zero import bucket_size, partition_elements

PARTS = (
    "frozen weights",
    "Θ",
    "gradients of Θ",
    "masters and moments",
    "DeepSpeed's buckets",
    "activations",
    "communication buffers",
    "logits",
    "working memory",
)


@dataclass(frozen=True)
class Moment:
    """What exists at one moment of a step, in bytes, beside what is always there; the keys are of PARTS."""

    name: str
    parts: dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank by part at the fullest moment. `moment` names it."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(job: Job, tp_rank: int) -> Memory:
    """The fullest moment of an optimizer step on tensor-parallel rank `tp_rank`."""
    theta = theta_on_rank(job, tp_rank)
    fixed = standing(job, theta)
    fullest = max(moments(job, tp_rank), key=lambda moment: sum(moment.parts.values()))
    return Memory(fullest.name, {part: fixed.get(part, 0) + fullest.parts.get(part, 0) for part in PARTS})


def standing(job: Job, theta: ThetaOnRank) -> dict[str, int]:
    """Bytes that are there for the whole run. Gradients exist from the first microbatch's backward on."""
    data = job.layout.data
    partitions = partition_elements(theta.replicated, data) + partition_elements(theta.sharded, data)
    # With B's elements goes their place in the dense Bᵀ (int64), with each rank its scale.
    buffers = 8 * theta.b + 4 * theta.total_ranks
    return {
        "frozen weights": frozen_bytes(job) + _lanes(job),
        "Θ": 4 * theta.elements + buffers,
        "gradients of Θ": 4 * theta.elements,
        "masters and moments": 12 * partitions if theta.elements else 0,
    }


def frozen_bytes(job: Job) -> int:
    """Φ on a rank; with rotary positions their frequencies in fp32."""
    return job.itemsize * frozen_on_rank(job) + (0 if job.shape.position_rows else 2 * job.shape.head_dim)


def _lanes(job: Job) -> int:
    """Factors in the base's dtype, in the buffers of the weights that they lie beside."""
    if not (job.lanes and job.layout.sequence and job.layout.tensor > 1):
        return 0
    n, found = job.layout.tensor, 0
    for layer, _, count in job.placement.kinds:
        for name, factors in zip(LINEARS, layer, strict=True):
            linear = job.shape.linears[name]
            side = linear.out_features if linear.kind == "column" else linear.in_features
            found += count * total_rank(factors) * side // n
    return job.itemsize * found


def saved_of_layer(job: Job, layer: Layer, stream: bool) -> int:
    """Bytes that a layer saves for backward, where its activations are kept."""
    shape, n, e = job.shape, job.layout.tensor, job.itemsize
    t, tj, h = job.tokens, job.shard_tokens, job.shape.hidden
    qkv, proj, fc1, fc2 = (total_rank(factors) for factors in layer)
    _, attention, after_attention, activation = gradients(layer, stream)
    heads_out = t * shape.linears["linear_proj"].in_features // n * e
    found = (stream + after_attention) * _norm(job, tj, h)
    found += _adapted(qkv, tj * h * e, t * qkv * e)
    if attention:
        found += _attention(job, heads_out)
    # Attention's output is proj's input, but where it is put together from those of packed samples.
    shared = attention and not job.packing
    found += _adapted(proj, 0 if shared else heads_out, tj * proj * e)
    found += _adapted(fc1, tj * h * e, t * fc1 * e)
    inner = t * shape.ffn // n * e
    if activation:
        found += _widths(job) * inner
    # ReLU's backward reads its output, which is fc2's input.
    return found + _adapted(fc2, 0 if activation and shape.activation == "relu" else inner, tj * fc2 * e)


def _widths(job: Job) -> int:
    """What the activation saves, in widths of ffn: Megatron's own expression of a gated one keeps all its steps."""
    if not job.shape.gated:
        return 1
    return 2 if job.shape.activation == "silu" else 4


def _adapted(rank: int, x: int, u: int) -> int:
    """An adapted linear saves its input and U; a frozen one nothing but its weight."""
    return x + u if rank else 0


def _norm(job: Job, rows: int, features: int) -> int:
    """A frozen norm saves its input and a statistic or two of each row.

    PyTorch's RMSNorm is fused on CUDA; on a CPU it is written out and saves the input in fp32.
    """
    layer_norm = job.shape.norm == "LayerNorm"
    itemsize = 4 if _written_out(job) else job.itemsize
    return rows * features * itemsize + rows * (2 * job.itemsize if layer_norm else 4)


def _written_out(job: Job) -> bool:
    """Whether norms save a copy of their input in fp32 in place of the input."""
    return job.device == "cpu" and job.shape.norm == "RMSNorm" and job.itemsize < 4


def _attention(job: Job, heads_out: int) -> int:
    """q, k, v, the output and log Σ exp of flash attention. v lies inside the fused q, k, v, which it keeps alive."""
    shape, n, e, t = job.shape, job.layout.tensor, job.itemsize, job.tokens
    whole_heads = shape.kv_heads >= n
    fused = t * shape.linears["linear_qkv"].out_features // (n if whole_heads else 1) * e
    keys = t * max(1, shape.kv_heads // n) * shape.head_dim * e
    found = fused + heads_out + 4 * t * shape.heads // n
    # q is taken together from between the k and v of every group, unless a head or a group is all there is.
    copied = whole_heads and shape.kv_heads // n > 1 and shape.heads > shape.kv_heads
    if not shape.position_rows:
        found += heads_out + keys  # rotated q and k
    elif copied:
        found += heads_out
    if shape.qk_norm:
        written_out = _written_out(job)
        queries = t * (shape.heads // n if whole_heads else shape.heads // shape.kv_heads) * shape.head_dim * e
        norms = (queries + keys) * (4 // e if written_out else 1)
        # In fp32 the norms save q and k where they lie; q perhaps in its copy.
        found += norms if written_out else (queries if copied else 0)
        found += 4 * (queries + keys) // (shape.head_dim * e)
    return found


def activations(job: Job, *, recompute: bool) -> int:
    """Bytes saved for backward of one microbatch: all of it, or with recomputation the inputs of the layers."""
    found = 0
    for layer, stream, count in job.placement.kinds:
        if not (stream or any(layer)):
            continue
        found += count * (_kept_of_layer(job, layer) if recompute else saved_of_layer(job, layer, stream))
    if job.placement.trains:
        # The final norm's input, and the head's gradient at the targets, which is formed in forward.
        found += _norm(job, job.shard_tokens, job.shape.hidden) + job.targets * job.shape.hidden * job.itemsize
    rotates_back = any(gradients(layer, stream)[1] for layer, stream, _ in job.placement.kinds)
    if rotates_back and not job.shape.position_rows:
        # cos and sin of half a head each; packed rows have positions of their own.
        rows = job.layout.micro_batch if job.packing else 1
        found += rows * job.sequence_length * job.shape.head_dim * job.itemsize
    return found


def _kept_of_layer(job: Job, layer: Layer) -> int:
    """Where activations are recomputed: a layer's input, and U_j of its row-parallel linears, which their second half
    keeps beside the graph so that nothing asks for the reduction again (parallel/autograd.py).
    """
    columns = job.shape.hidden + (total_rank(layer[1]) + total_rank(layer[3]) if _sequence(job) else 0)
    return job.shard_tokens * columns * job.itemsize


def moments(job: Job, tp_rank: int) -> list[Moment]:
    """The moments of a step of which one is the fullest."""
    recompute = job.layout.recompute
    kept = activations(job, recompute=recompute)
    top, stream = job.placement.top
    layer = 0
    if recompute and (stream or any(top)):
        layer = saved_of_layer(job, top, stream)
        if stream and not _written_out(job):
            layer -= job.shard_tokens * job.shape.hidden * job.itemsize  # the norm's input is the layer's, kept anyway
    # Once backward is past the final norm, what that saved is free.
    below = kept + layer - _norm(job, job.shard_tokens, job.shape.hidden)
    found = [
        _head(job, kept),
        _head_backward(job, kept),
        Moment("backward of the final norm", {"activations": kept, "working memory": _norm_backward(job)}),
        _mlp_backward(job, top, below),
        _attention_backward(job, top, stream, below),
    ]
    if recompute:
        found.append(_recomputation(job, top, below))
    # DeepSpeed allocates its bucket when the first gradient of Θ arrives, which is one of the top layer's.
    bucket = {"DeepSpeed's buckets": 4 * bucket_size(job, tp_rank)}
    layers = [Moment(moment.name, moment.parts | bucket) for moment in found[3:]]
    return [*found[:3], *layers, _step(job, tp_rank)]


def _head(job: Job, kept: int) -> Moment:
    """Loss and its gradient, one block of target positions at a time."""
    e, h = job.itemsize, job.shape.hidden
    rows, positions = head_rows(job), min(job.targets, logit_block(job))
    own = positions * h
    exponentials = 4 * positions * rows
    cast = e * positions * rows if e < 4 else 0
    # The product with W in the base's dtype beside its fp32 copy; then the gradient's, in fp32 beside two more.
    logits = exponentials + cast
    working = own * e if logits + own * e > exponentials + own * (4 + 2 * e) else own * (4 + 2 * e)
    if working != own * e:
        logits = exponentials
    chosen = job.targets * h * e  # the hidden states at the targets; their gradient is among the activations
    return Moment("vocabulary projection", {"activations": kept, "logits": logits, "working memory": working + chosen})


def _head_backward(job: Job, kept: int) -> Moment:
    """dH at the targets spread over all tokens: the zeros, and the sum with what is put into them."""
    working = 2 * job.tokens * job.shape.hidden * job.itemsize
    return Moment("gradient of the head", {"activations": kept, "working memory": working})


def _norm_backward(job: Job) -> int:
    """dX of a norm over T_j tokens; an RMSNorm that is written out (on a CPU) goes through five products in fp32."""
    elements = job.shard_tokens * job.shape.hidden
    if job.device == "cpu" and job.shape.norm == "RMSNorm":
        return elements * 5 * 4
    return elements * 3 * job.itemsize


def _mlp_backward(job: Job, top: Layer, kept: int) -> Moment:
    """The topmost layer's MLP: gradients as wide as ffn beside nearly all that was saved."""
    shape, e, t = job.shape, job.itemsize, job.tokens
    fc1, fc2 = total_rank(top[2]), total_rank(top[3])
    inner = t * shape.ffn // job.layout.tensor * e
    residual = job.shard_tokens * shape.hidden * e
    freed = inner if fc2 else 0  # fc2's input, once fc2 is behind
    # dY and dX, and a product on the way where two factors meet.
    wide = 4 if shape.gated else 2
    whole, sequence = t * shape.hidden * e, _sequence(job)
    # On a CPU a product that is a part of a message is computed apart and copied into it.
    apart = whole if sequence and job.device == "cpu" and not job.lanes else 0
    candidates = [
        # fc2: [dY ∣ dU] of all tokens came together, dX is written.
        (_message(job, fc2), inner + residual),
        # The activation: its gradient and what it needs on the way.
        (0, wide * inner + residual - freed),
        # fc1: dX leaves as a partial sum.
        (_message(job, fc1), residual + apart + (0 if sequence else whole) - freed),
    ]
    buffers, working = max(candidates, key=sum)
    parts = {"activations": kept, "communication buffers": buffers, "working memory": working}
    return Moment("backward of the top MLP", parts)


def _attention_backward(job: Job, top: Layer, stream: bool, kept: int) -> Moment:
    """The norm between attention and MLP: what the MLP saved is free, the norm's products are as wide as H."""
    mlp_only = saved_of_layer(job, ((), (), *top[2:]), True) - saved_of_layer(job, ((), (), (), ()), True)
    inner = job.tokens * job.shape.ffn // job.layout.tensor * job.itemsize
    freed = (mlp_only + _widths(job) * inner) if stream or any(top) else 0
    return Moment("backward of the top attention", {"activations": kept - freed, "working memory": _norm_backward(job)})


def _recomputation(job: Job, top: Layer, kept: int) -> Moment:
    """The end of the topmost layer's second forward: fc2's product, while the gradient that asked for it waits."""
    e, whole = job.itemsize, job.tokens * job.shape.hidden * job.itemsize
    residual = (2 if _written_out(job) else 1) * job.shard_tokens * job.shape.hidden * e
    waiting, product = _message(job, total_rank(top[3])), _message(job, total_rank(top[3]))
    apart = whole if _sequence(job) and job.device == "cpu" and not job.lanes and top[3] else 0
    working = residual + apart + (0 if _sequence(job) else whole)
    parts = {"activations": kept, "communication buffers": waiting + product, "working memory": working}
    return Moment("recomputation of the top layer", parts)


def _sequence(job: Job) -> bool:
    return job.layout.sequence and job.layout.tensor > 1


def _message(job: Job, rank: int) -> int:
    """[T, H + R] under sequence parallelism, whole on the rank that gathers it or gives it away."""
    return job.tokens * (job.shape.hidden + rank) * job.itemsize if _sequence(job) else 0


def _step(job: Job, tp_rank: int) -> Moment:
    """AdamW on a flat gradient partition, with two temporaries as large."""
    theta = theta_on_rank(job, tp_rank)
    partitions = [partition_elements(elements, job.layout.data) for elements in (theta.replicated, theta.sharded)]
    return Moment("optimizer step", {"working memory": 4 * 3 * max(partitions)})
