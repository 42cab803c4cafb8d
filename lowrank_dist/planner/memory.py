"""Memory of one GPU (or of one rank on a CPU) at the fullest moment of a step, by part.

Tensors that live for the whole run are counted exactly; activations are what autograd saves (planner/activations.py).
The peak is the largest of a few moments: the vocabulary projection, the gradient that comes back from it, the topmost
layer's backward, the optimizer's step, and the prompts of an evaluation that generates.

Legend: T tokens of a microbatch, T_j those on a rank outside attention and MLP, H hidden, R = Σ r of a linear, e bytes
of an element of the base, Φ the base's weights, Θ the trained parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowrank_dist.planner.activations import (
    activations,
    bytes_outside_graph,
    kept_of_layer,
    norm_saves,
    saved_of_layer,
    widths,
    written_out,
)
from lowrank_dist.planner.factors import Layer, total_rank
from lowrank_dist.planner.job import Decoding, Job, Moment, head_rows, padded_vocab
from lowrank_dist.planner.parameters import (
    ThetaOnRank,
    bucket_size,
    frozen_on_rank,
    partition_elements,
    theta_on_rank,
)
from lowrank_dist.planner.traffic import logit_block

# Largest relative error of the memory formulas that `plan --verify` and the tests accept.
ACCURACY = 0.05
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
    """Return the memory at the fullest moment of a run on tensor-parallel rank `tp_rank`."""
    theta = theta_on_rank(job, tp_rank)
    fixed = persistent_bytes(job, theta)
    fullest = max(moments(job, tp_rank), key=lambda moment: sum(moment.parts.values()))
    return Memory(fullest.name, {part: fixed.get(part, 0) + fullest.parts.get(part, 0) for part in PARTS})


def persistent_bytes(job: Job, theta: ThetaOnRank) -> dict[str, int]:
    """Return the bytes that exist for the whole run. Gradients count: they outlive a microbatch."""
    data = job.layout.data
    partitions = partition_elements(theta.replicated, data) + partition_elements(theta.sharded, data)
    # Each element of B has an int64 index into the dense Bᵀ, each of the R rows of A an fp32 scale.
    buffers = 8 * theta.b + 4 * theta.total_ranks + job.footprint.buffers(job, theta.rows)
    return {
        "frozen weights": frozen_bytes(job) + _fused_factors(job),
        "Θ": 4 * theta.elements + buffers,
        "gradients of Θ": 4 * theta.elements,
        "masters and moments": 12 * partitions if theta.elements else 0,
    }


def frozen_bytes(job: Job) -> int:
    """Return the bytes of Φ on a rank and of the fp32 rotary frequencies; only the latter where Φ is trained."""
    head_dim = job.architecture.head_dim
    frequencies = sum(
        2 * rope.rotated(head_dim) * (2 if rope.type == "longrope" else 1) for rope in job.architecture.ropes
    )
    return frequencies + (0 if job.footprint.trains_base else job.itemsize * frozen_on_rank(job))


def _fused_factors(job: Job) -> int:
    """Return the bytes of fused factors: copies in the base's dtype, in one buffer with the weight."""
    if not (job.fuse_factors and job.layout.sequence and job.layout.tensor > 1):
        return 0
    n, found = job.layout.tensor, 0
    for layer, _, count in job.placement.kinds:
        for linear, factors in layer.linears:
            side = linear.out_features if linear.kind == "column" else linear.in_features
            found += count * total_rank(factors) * side // n
    return job.itemsize * found


def moments(job: Job, tp_rank: int) -> list[Moment]:
    """Return the moments that may be the fullest: those of a microbatch, the optimizer's step, an evaluation."""
    decoding = [] if job.decoding is None else [_prompts(job, job.decoding, theta_on_rank(job, tp_rank))]
    return [*microbatch_moments(job, tp_rank), _step(job, tp_rank), *decoding]


def microbatch_moments(job: Job, tp_rank: int) -> list[Moment]:
    """Return the moments of forward and backward."""
    recompute, depth = job.layout.recompute, len(job.placement.layers)
    kept = activations(job, recompute=recompute)
    ends = [
        _head(job, kept),
        _head_backward(job, kept),
        Moment("backward of the final norm", {"activations": kept, "working memory": _norm_backward(job)}),
    ]
    # What the final norm saved is freed after its backward. In a lower layer, what the layers above kept has been freed
    # too, except what is kept outside the autograd graph.
    below = kept - norm_saves(job, job.shard_tokens, job.architecture.hidden)
    # DeepSpeed allocates its bucket when the first gradient of Θ arrives, which is one of the top layer's.
    bucket = {"DeepSpeed's buckets": 4 * bucket_size(job, tp_rank)}
    # In a step of one microbatch, gradients are allocated layer by layer during backward; the head's come first.
    only = job.microbatches == 1
    of_head = 4 * _head_weight(job) * (job.footprint.trains_base and not job.architecture.tied)
    theta = theta_on_rank(job, tp_rank).elements
    layers = []
    for top, input_requires_grad, above in job.placement.topmost_of_each_kind:
        freed = sum(
            kept_of_layer(job, layer, into, recompute=recompute) - bytes_outside_graph(job, layer)
            for layer, into in above
        )
        missing = {"gradients of Θ": of_head - 4 * (theta * (depth - len(above)) // depth)} if only else {}
        layers += [
            Moment(moment.name, moment.parts | bucket | missing)
            for moment in _of_layer(job, top, input_requires_grad, below - freed)
        ]
    if not only:
        return [*ends, *layers]
    lowest, into_lowest, _ = job.placement.kinds[0]
    beside = sum(count * bytes_outside_graph(job, layer) for layer, _, count in job.placement.kinds)
    kept = saved_of_layer(job, lowest, into_lowest) + beside - bytes_outside_graph(job, lowest)
    last = _mlp_backward(job, lowest, kept)
    return [
        *(Moment(moment.name, moment.parts | {"gradients of Θ": -4 * theta}) for moment in ends),
        *layers,
        Moment("backward of the lowest layer", last.parts | bucket),
    ]


def _of_layer(job: Job, top: Layer, input_requires_grad: bool, below: int) -> list[Moment]:
    """Return the moments in the backward of `top`, the topmost layer of its kind.

    below: bytes that it and the layers below it keep.
    """
    if job.layout.recompute and (input_requires_grad or top.adapted):
        below += saved_of_layer(job, top, input_requires_grad) - bytes_outside_graph(job, top)
        normed = top.kind.has("input_layernorm")
        trained = job.footprint.trains_base or top.total_rank("linear_qkv")
        if (input_requires_grad and not written_out(job)) if normed else trained:
            # The input of the norm, or without one that of the trained linear, is the layer's, which is kept anyway.
            below -= job.shard_tokens * job.architecture.hidden * job.itemsize
    # What a method has behind the MLP runs backward first, which frees what it saved.
    behind_mlp = below - job.footprint.saved_behind_mlp(job)
    if job.footprint.trains_base and job.architecture.tied:
        # The head's part of the tied embeddings' gradient is kept until the lookup's part, at the end of backward.
        behind_mlp += 4 * _head_weight(job)
    found = [_mlp_backward(job, top, behind_mlp), _attention_backward(job, top, input_requires_grad, behind_mlp)]
    if top.kind.has("post_mlp_layernorm"):
        kept = behind_mlp + job.footprint.saved_behind_mlp(job)
        parts = {"activations": kept, "working memory": _norm_backward(job)}
        found.append(Moment("backward of the top layer's last norm", parts))
    if job.layout.recompute:
        found.append(_recomputation(job, top, below))
    return [*found, *job.footprint.backward_moments(job, top, below)]


def _head(job: Job, kept: int) -> Moment:
    """Return the moment of the vocabulary projection: loss and gradient, one block of target positions at a time."""
    e, h = job.itemsize, job.architecture.hidden
    rows, positions = head_rows(job), min(job.targets, logit_block(job))
    own = positions * h
    exponentials = 4 * positions * rows
    cast = e * positions * rows if e < 4 else 0
    # The larger of two: the product with W in the base's dtype beside the logits and their cast; or that product in
    # fp32 beside two tensors of its size in the base's dtype.
    logits = exponentials + cast
    working = own * e if logits + own * e > exponentials + own * (4 + 2 * e) else own * (4 + 2 * e)
    if working != own * e:
        logits = exponentials
    chosen = job.targets * h * e  # the hidden states at the targets; their gradient is among the activations
    if job.footprint.trains_base:
        # dW is summed in fp32 (the result that is kept has the base's dtype), beside the weight's cast.
        logits = exponentials + cast
        working = 4 * own + 4 * rows * h + (e * _head_weight(job) if e < 4 else 0)
    return Moment("vocabulary projection", {"activations": kept, "logits": logits, "working memory": working + chosen})


def _head_backward(job: Job, kept: int) -> Moment:
    """Return the moment when dH at the targets is spread over all tokens: zeros, and their sum with dH."""
    working = 2 * job.tokens * job.architecture.hidden * job.itemsize
    if job.footprint.trains_base:
        # dW beside it, padding included, in the base's dtype and in fp32.
        working += _head_weight(job) * (job.itemsize + 4 if job.itemsize < 4 else 4)
    return Moment("gradient of the head", {"activations": kept, "working memory": working})


def _norm_backward(job: Job) -> int:
    """Return the working bytes of a norm's backward over T_j tokens. RMSNorm on a CPU makes five fp32 products."""
    elements = job.shard_tokens * job.architecture.hidden
    if job.device == "cpu" and job.architecture.norm == "RMSNorm":
        return elements * 5 * 4
    return elements * 3 * job.itemsize


def _mlp_backward(job: Job, top: Layer, kept: int) -> Moment:
    """Return the moment of the topmost layer's MLP: ffn-wide gradients beside nearly all saved activations."""
    arch, e, t = job.architecture, job.itemsize, job.tokens
    fc1, fc2 = top.total_rank("linear_fc1"), top.total_rank("linear_fc2")
    inner = t * top.kind.ffn // job.layout.tensor * e
    residual = job.shard_tokens * arch.hidden * e
    trained = job.footprint.trains_base
    freed = inner if fc2 or trained else 0  # fc2's input, after fc2's backward
    # A trained weight's gradient in the base's dtype, then in fp32, when the gradient of fc1's output has been freed.
    weight = top.kind.linears["linear_fc1"].weights // job.layout.tensor * trained
    grown = weight * e + (max(0, 4 * weight - widths(job) * inner) if e < 4 else 0)
    # dY and dX, and with a gate as much again, for the intermediate products. In Megatron's expression the steps that
    # were saved are freed before dX is put together.
    wide = (4 if arch.activation == "silu" else 3) if arch.gated else 2
    whole, sequence = t * arch.hidden * e, job.sequence_parallel
    # What is saved behind a product is freed before the product's backward, except what is kept outside the graph.
    behind_fc1, behind_fc2 = (
        job.footprint.saved_behind_linear(job, top.kind.linears[name], top.on(name))
        for name in ("linear_fc1", "linear_fc2")
    )
    kept -= 0 if sequence else behind_fc2
    # On a CPU a product that is part of a message is computed separately and copied into the message.
    apart = whole if sequence and job.device == "cpu" and not job.fuse_factors else 0
    candidates = [
        # fc2: the gathered [dY ∣ dU] of all tokens, while dX is written.
        (_message(job, fc2), inner + residual),
        # The activation: its gradient and intermediate products.
        (0, wide * inner + residual - freed),
        # fc1: dX leaves as a partial sum.
        (_message(job, fc1), residual + apart + (0 if sequence else whole) + grown - freed - behind_fc1),
    ]
    buffers, working = max(candidates, key=sum)
    parts = {"activations": kept, "communication buffers": buffers, "working memory": working}
    return Moment("backward of the top MLP", parts)


def _attention_backward(job: Job, top: Layer, input_requires_grad: bool, kept: int) -> Moment:
    """Return the moment when the norm between attention and MLP runs backward.

    The MLP's activations are freed by then, and the norm's working tensors are H wide.
    """
    frozen, adapted = replace(top, factors=((),) * len(top.factors)), top.part(in_attention=False)
    mlp_only = (
        saved_of_layer(job, adapted, True) - saved_of_layer(job, frozen, True) - bytes_outside_graph(job, adapted)
    )
    inner = job.tokens * top.kind.ffn // job.layout.tensor * job.itemsize
    freed = (mlp_only + widths(job) * inner) if input_requires_grad or top.adapted else 0
    return Moment("backward of the top attention", {"activations": kept - freed, "working memory": _norm_backward(job)})


def _recomputation(job: Job, top: Layer, kept: int) -> Moment:
    """Return the moment when the topmost layer's recomputation ends: fc2's output beside that output's gradient."""
    e, whole = job.itemsize, job.tokens * job.architecture.hidden * job.itemsize
    residual = (2 if written_out(job) else 1) * job.shard_tokens * job.architecture.hidden * e
    fc2 = top.total_rank("linear_fc2")
    waiting, product = _message(job, fc2), _message(job, fc2)
    unfused = job.sequence_parallel and job.device == "cpu" and not job.fuse_factors
    apart = whole if unfused and top.on("linear_fc2") else 0
    working = residual + apart + (0 if job.sequence_parallel else whole)
    working += bytes_outside_graph(job, top.part(in_attention=True))  # the recomputed copy, beside the first
    parts = {"activations": kept, "communication buffers": waiting + product, "working memory": working}
    return Moment("recomputation of the top layer", parts)


def _message(job: Job, rank: int) -> int:
    """Return the bytes of a message [T, H + R], which is whole on a rank under sequence parallelism; else 0."""
    return job.tokens * (job.architecture.hidden + rank) * job.itemsize if job.sequence_parallel else 0


def _step(job: Job, tp_rank: int) -> Moment:
    """Return the moment of the optimizer step: AdamW on a flat gradient partition, with two temporaries of its size.

    The gradients of the parameter group have been freed by then.
    """
    theta = theta_on_rank(job, tp_rank)
    found, freed = [], 0
    for elements in (theta.replicated, theta.sharded):
        freed += 4 * elements
        parts = {"gradients of Θ": -freed, "working memory": 4 * 3 * partition_elements(elements, job.layout.data)}
        found.append(Moment("optimizer step", parts))
    return max(found, key=lambda moment: sum(moment.parts.values()))


def _prompts(job: Job, decoding: Decoding, theta: ThetaOnRank) -> Moment:
    """Return the moment when an evaluation reads its prompts: one layer on all of them, at the maximum sample length.

    The cache for keys and values of prompts and new tokens is allocated at the beginning. Nothing is saved for
    backward, gradients are freed, and there is no sequence parallelism.
    """
    arch, n, e = job.architecture, job.layout.tensor, job.itemsize
    residual = decoding.batch * job.row * arch.hidden * e
    inner = decoding.batch * job.row * max(kind.ffn for kind in arch.kinds) // n * e
    columns = min(job.length + decoding.new_tokens, arch.max_positions) - 1
    heads = max(1, arch.kv_heads // n)
    kept = 2 * len(arch.layers) * decoding.batch * heads * columns * arch.head_dim * e
    # The embeddings, the layer's input, the MLP's input and its norm; and the activation beside its own input.
    working = 4 * residual + (3 if arch.gated else 2) * inner
    working = max(working, job.footprint.evaluation_working(job, residual))
    if job.footprint.trains_base and e < 4:
        working = max(working, residual + e * _head_weight(job))  # the head's cast
    parts = {
        "gradients of Θ": -4 * theta.elements,
        "keys and values": kept,
        "working memory": working,
    }
    return Moment("prompts of an evaluation", parts)


def _head_weight(job: Job) -> int:
    """Return the elements of the head on a rank, padding included."""
    return padded_vocab(job) // job.layout.tensor * job.architecture.hidden
