"""Memory of one GPU (or of one rank on a CPU) at the fullest moment of a step, by part.

What lives for the whole run is counted exactly; activations are what autograd saves (plan/activations.py). Beside them
the largest of a few moments decides: the vocabulary projection, the gradient that comes back from it, the topmost
layer's backward, the optimizer's step, and the prompts of an evaluation that generates.

Legend: T tokens of a microbatch, T_j on a rank outside attention and MLP, H hidden, F ffn, N tensor-parallel ranks,
R = Σ r of a linear, n target tokens, e bytes of an element of the base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowrank_dist.plan.activations import (
    activations,
    beside_graph,
    kept_of_layer,
    norm_saves,
    saved_of_layer,
    widths,
    written_out,
)
from lowrank_dist.plan.factors import Layer, total_rank
from lowrank_dist.plan.job import Decoding, Job, Moment, head_rows, padded_vocab
from lowrank_dist.plan.parameters import (
    ThetaOnRank,
    bucket_size,
    frozen_on_rank,
    partition_elements,
    theta_on_rank,
)
from lowrank_dist.plan.traffic import logit_block

PARTS = (
    "frozen weights",
    "Θ",
    "gradients of Θ",
    "masters and moments",
    "DeepSpeed's buckets",
    "activations",
    "communication buffers",
    "logits",
    "keys and values",
    "working memory",
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank by part at the fullest moment. `moment` names it."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(job: Job, tp_rank: int) -> Memory:
    """The fullest moment of a run on tensor-parallel rank `tp_rank`."""
    theta = theta_on_rank(job, tp_rank)
    fixed = standing(job, theta)
    fullest = max(moments(job, tp_rank), key=lambda moment: sum(moment.parts.values()))
    return Memory(fullest.name, {part: fixed.get(part, 0) + fullest.parts.get(part, 0) for part in PARTS})


def standing(job: Job, theta: ThetaOnRank) -> dict[str, int]:
    """Bytes that are there for the whole run. Gradients exist from the first of several microbatches on."""
    data = job.layout.data
    partitions = partition_elements(theta.replicated, data) + partition_elements(theta.sharded, data)
    # With B's elements goes their place in the dense Bᵀ (int64), with each rank its scale.
    buffers = 8 * theta.b + 4 * theta.total_ranks + job.footprint.buffers(job, theta.rows)
    return {
        "frozen weights": frozen_bytes(job) + _lanes(job),
        "Θ": 4 * theta.elements + buffers,
        "gradients of Θ": 4 * theta.elements,
        "masters and moments": 12 * partitions if theta.elements else 0,
    }


def frozen_bytes(job: Job) -> int:
    """Φ on a rank; with rotary positions their frequencies in fp32. Where Φ is trained, these alone."""
    frequencies = 0 if job.architecture.position_rows else 2 * job.architecture.head_dim
    return frequencies + (0 if job.footprint.trains_base else job.itemsize * frozen_on_rank(job))


def _lanes(job: Job) -> int:
    """Factors in the base's dtype, in the buffers of the weights that they lie beside."""
    if not (job.lanes and job.layout.sequence and job.layout.tensor > 1):
        return 0
    n, found = job.layout.tensor, 0
    for layer, _, count in job.placement.kinds:
        for linear, factors in layer.linears:
            side = linear.out_features if linear.kind == "column" else linear.in_features
            found += count * total_rank(factors) * side // n
    return job.itemsize * found


def moments(job: Job, tp_rank: int) -> list[Moment]:
    """The moments of which one is the fullest: of a microbatch, the optimizer's step, an evaluation."""
    decoding = [] if job.decoding is None else [_prompts(job, job.decoding, theta_on_rank(job, tp_rank))]
    return [*of_microbatch(job, tp_rank), _step(job, tp_rank), *decoding]


def of_microbatch(job: Job, tp_rank: int) -> list[Moment]:
    """The moments of forward and backward."""
    recompute, depth = job.layout.recompute, len(job.placement.layers)
    kept = activations(job, recompute=recompute)
    ends = [
        _head(job, kept),
        _head_backward(job, kept),
        Moment("backward of the final norm", {"activations": kept, "working memory": _norm_backward(job)}),
    ]
    # Once backward is past the final norm, what that saved is free; in a lower layer what those above have kept, too,
    # but for what is beside the graph.
    below = kept - norm_saves(job, job.shard_tokens, job.architecture.hidden)
    # DeepSpeed allocates its bucket when the first gradient of Θ arrives, which is one of the top layer's.
    bucket = {"DeepSpeed's buckets": 4 * bucket_size(job, tp_rank)}
    # Of a step's only microbatch: gradients come as backward goes down. The head's are there from the top layer on.
    only = job.microbatches == 1
    of_head = 4 * _head_weight(job) * (job.footprint.trains_base and not job.architecture.tied)
    theta = theta_on_rank(job, tp_rank).elements
    layers = []
    for top, stream, above in job.placement.tops:
        freed = sum(
            kept_of_layer(job, layer, into, recompute=recompute) - beside_graph(job, layer) for layer, into in above
        )
        missing = {"gradients of Θ": of_head - 4 * (theta * (depth - len(above)) // depth)} if only else {}
        layers += [
            Moment(moment.name, moment.parts | bucket | missing)
            for moment in _of_layer(job, top, stream, below - freed)
        ]
    if not only:
        return [*ends, *layers]
    lowest, into_lowest, _ = job.placement.kinds[0]
    beside = sum(count * beside_graph(job, layer) for layer, _, count in job.placement.kinds)
    kept = saved_of_layer(job, lowest, into_lowest) + beside - beside_graph(job, lowest)
    last = _mlp_backward(job, lowest, kept)
    return [
        *(Moment(moment.name, moment.parts | {"gradients of Θ": -4 * theta}) for moment in ends),
        *layers,
        Moment("backward of the lowest layer", last.parts | bucket),
    ]


def _of_layer(job: Job, top: Layer, stream: bool, below: int) -> list[Moment]:
    """The moments of a layer's backward, the topmost of its kind. below: bytes kept of it and of those under it."""
    if job.layout.recompute and (stream or top.adapted):
        below += saved_of_layer(job, top, stream) - beside_graph(job, top)
        if stream and not written_out(job):
            # The norm's input is the layer's, kept anyway.
            below -= job.shard_tokens * job.architecture.hidden * job.itemsize
    # What a method has behind the MLP comes first.
    behind_mlp = below - job.footprint.saved_behind_mlp(job)
    if job.footprint.trains_base and job.architecture.tied:
        # The head's part of the embeddings' gradient waits for the lookup's, until backward is over.
        behind_mlp += 4 * _head_weight(job)
    found = [_mlp_backward(job, top, behind_mlp), _attention_backward(job, top, stream, behind_mlp)]
    if job.layout.recompute:
        found.append(_recomputation(job, top, below))
    return [*found, *job.footprint.backward_moments(job, top, below)]


def _head(job: Job, kept: int) -> Moment:
    """The vocabulary projection: loss and its gradient, one block of target positions at a time."""
    e, h = job.itemsize, job.architecture.hidden
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
    if job.footprint.trains_base:
        # dW is summed in fp32 (what is kept of it has the base's dtype), of a product beside the weight's cast.
        logits = exponentials + cast
        working = 4 * own + 4 * rows * h + (e * _head_weight(job) if e < 4 else 0)
    return Moment("vocabulary projection", {"activations": kept, "logits": logits, "working memory": working + chosen})


def _head_backward(job: Job, kept: int) -> Moment:
    """dH at the targets spread over all tokens: the zeros, and the sum with what is put into them."""
    working = 2 * job.tokens * job.architecture.hidden * job.itemsize
    if job.footprint.trains_base:
        # dW beside it, with padding, and in fp32.
        working += _head_weight(job) * (job.itemsize + 4 if job.itemsize < 4 else 4)
    return Moment("gradient of the head", {"activations": kept, "working memory": working})


def _norm_backward(job: Job) -> int:
    """dX of a norm over T_j tokens; an RMSNorm that is written out (on a CPU) goes through five products in fp32."""
    elements = job.shard_tokens * job.architecture.hidden
    if job.device == "cpu" and job.architecture.norm == "RMSNorm":
        return elements * 5 * 4
    return elements * 3 * job.itemsize


def _mlp_backward(job: Job, top: Layer, kept: int) -> Moment:
    """The topmost layer's MLP: gradients as wide as ffn beside nearly all that was saved."""
    arch, e, t = job.architecture, job.itemsize, job.tokens
    fc1, fc2 = top.rank("linear_fc1"), top.rank("linear_fc2")
    inner = t * top.kind.ffn // job.layout.tensor * e
    residual = job.shard_tokens * arch.hidden * e
    trained = job.footprint.trains_base
    freed = inner if fc2 or trained else 0  # fc2's input, once fc2 is behind
    # A trained weight's gradient in the base's dtype, then in fp32, when the gradient of fc1's output is free.
    weight = top.kind.linears["linear_fc1"].weights // job.layout.tensor * trained
    grown = weight * e + (max(0, 4 * weight - widths(job) * inner) if e < 4 else 0)
    # dY and dX, and a product on the way where two factors meet.
    wide = 4 if arch.gated else 2
    whole, sequence = t * arch.hidden * e, job.sequence_parallel
    # What is saved behind a product is free before it, but for what is kept beside the graph.
    behind_fc1, behind_fc2 = (
        job.footprint.saved_behind_linear(job, top.kind.linears[name], top.on(name))
        for name in ("linear_fc1", "linear_fc2")
    )
    kept -= 0 if sequence else behind_fc2
    # On a CPU a product that is a part of a message is computed apart and copied into it.
    apart = whole if sequence and job.device == "cpu" and not job.lanes else 0
    candidates = [
        # fc2: [dY ∣ dU] of all tokens came together, dX is written.
        (_message(job, fc2), inner + residual),
        # The activation: its gradient and what it needs on the way.
        (0, wide * inner + residual - freed),
        # fc1: dX leaves as a partial sum.
        (_message(job, fc1), residual + apart + (0 if sequence else whole) + grown - freed - behind_fc1),
    ]
    buffers, working = max(candidates, key=sum)
    parts = {"activations": kept, "communication buffers": buffers, "working memory": working}
    return Moment("backward of the top MLP", parts)


def _attention_backward(job: Job, top: Layer, stream: bool, kept: int) -> Moment:
    """The norm between attention and MLP: what the MLP saved is free, the norm's products are as wide as H."""
    frozen, adapted = replace(top, factors=((),) * len(top.factors)), top.part(in_attention=False)
    mlp_only = saved_of_layer(job, adapted, True) - saved_of_layer(job, frozen, True) - beside_graph(job, adapted)
    inner = job.tokens * top.kind.ffn // job.layout.tensor * job.itemsize
    freed = (mlp_only + widths(job) * inner) if stream or top.adapted else 0
    return Moment("backward of the top attention", {"activations": kept - freed, "working memory": _norm_backward(job)})


def _recomputation(job: Job, top: Layer, kept: int) -> Moment:
    """The end of the topmost layer's second forward: fc2's product, while the gradient that asked for it waits."""
    e, whole = job.itemsize, job.tokens * job.architecture.hidden * job.itemsize
    residual = (2 if written_out(job) else 1) * job.shard_tokens * job.architecture.hidden * e
    fc2 = top.rank("linear_fc2")
    waiting, product = _message(job, fc2), _message(job, fc2)
    apart = whole if job.sequence_parallel and job.device == "cpu" and not job.lanes and top.on("linear_fc2") else 0
    working = residual + apart + (0 if job.sequence_parallel else whole)
    working += beside_graph(job, top.part(in_attention=True))  # made again, beside the first
    parts = {"activations": kept, "communication buffers": waiting + product, "working memory": working}
    return Moment("recomputation of the top layer", parts)


def _message(job: Job, rank: int) -> int:
    """[T, H + R] under sequence parallelism, whole on the rank that gathers it or gives it away."""
    return job.tokens * (job.architecture.hidden + rank) * job.itemsize if job.sequence_parallel else 0


def _step(job: Job, tp_rank: int) -> Moment:
    """The optimizer step: AdamW on a flat gradient partition, with two temporaries as large.

    The group's own gradients are free by then.
    """
    theta = theta_on_rank(job, tp_rank)
    found, freed = [], 0
    for elements in (theta.replicated, theta.sharded):
        freed += 4 * elements
        parts = {"gradients of Θ": -freed, "working memory": 4 * 3 * partition_elements(elements, job.layout.data)}
        found.append(Moment("optimizer step", parts))
    return max(found, key=lambda moment: sum(moment.parts.values()))


def _prompts(job: Job, decoding: Decoding, theta: ThetaOnRank) -> Moment:
    """An evaluation that reads its prompts: a layer on all of them, as long as samples may be.

    Their keys and values have their place, and that of the tokens to come, from the beginning. Nothing is saved for
    backward, gradients are gone, and there is no sequence parallelism.
    """
    arch, n, e = job.architecture, job.layout.tensor, job.itemsize
    stream = decoding.batch * job.row * arch.hidden * e
    inner = decoding.batch * job.row * max(kind.ffn for kind in arch.kinds) // n * e
    columns = min(job.length + decoding.new_tokens, arch.max_positions) - 1
    heads = max(1, arch.kv_heads // n)
    kept = 2 * len(arch.layers) * decoding.batch * heads * columns * arch.head_dim * e
    # The embeddings, the layer's input and that of its MLP, the norm of it; and the activation beside its own input.
    working = 4 * stream + (3 if arch.gated else 2) * inner
    working = max(working, job.footprint.evaluation_working(job, stream))
    if job.footprint.trains_base and e < 4:
        working = max(working, stream + e * _head_weight(job))  # the head's cast
    parts = {
        "gradients of Θ": -4 * theta.elements,
        "keys and values": kept,
        "working memory": working,
    }
    return Moment("prompts of an evaluation", parts)


def _head_weight(job: Job) -> int:
    """Elements of the head on a rank, padding included."""
    return padded_vocab(job) // job.layout.tensor * job.architecture.hidden
