"""The bytes that autograd saves for one microbatch on one rank.

The formulas follow parallel/autograd.py, model/layers.py, model/attention.py and model/causal_lm.py. A method's
footprint gives what the method adds.

Legend: T tokens of a microbatch, T_j those on a rank outside attention and MLP, H hidden, F ffn, N tensor-parallel
ranks, e bytes of an element of the base, U = X·Aᵀ the low-rank product of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_dist.arch.architecture import WINDOW_BLOCK, LayerKind
from lowrank_dist.planner.factors import Layer, gradients, total_rank
from lowrank_dist.planner.job import Job, head_rows
from lowrank_dist.planner.parameters import norm_elements


def saved_of_layer(job: Job, layer: Layer, input_requires_grad: bool) -> int:
    """Return the bytes that a layer saves for backward without recomputation."""
    arch, n, e = job.architecture, job.layout.tensor, job.itemsize
    t, tj, h = job.tokens, job.shard_tokens, job.architecture.hidden
    kind = layer.kind
    qkv, proj, fc1, fc2 = (layer.total_rank(f"linear_{name}") for name in ("qkv", "proj", "fc1", "fc2"))
    needs = gradients(layer, input_requires_grad)
    attention, after_attention, activation = (needs[f"linear_{name}"] for name in ("proj", "fc1", "fc2"))
    heads_out = t * kind.linears["linear_proj"].in_features // n * e
    trained = job.footprint.trains_base
    found = _norms(layer, input_requires_grad, needs) * norm_saves(job, tj, h)
    if job.sequence_parallel and not written_out(job):
        # A norm behind a row-parallel linear saves its input as a part of the message, which is R columns wider.
        behind = {"post_self_attn_layernorm": proj, "post_mlp_layernorm": fc2}
        found += tj * e * sum(rank for norm, rank in behind.items() if kind.has(norm))
    found += _linear(trained, qkv, tj * h * e, t * qkv * e)
    if attention:
        found += job.footprint.saved_by_attention(job, kind, input_requires_grad, _attention(job, kind, heads_out))
    # Attention's output is proj's input, except with packing and where a sample exceeds the layer's sliding window: the
    # input is then concatenated from the outputs of samples and of blocks of queries.
    shared = attention and not (job.packing or windowed(job, kind.sliding_window))
    found += _linear(trained, proj, 0 if shared else heads_out, tj * proj * e)
    found += _linear(trained, fc1, tj * h * e, t * fc1 * e)
    inner = t * kind.ffn // n * e
    if activation:
        found += widths(job) * inner
    # ReLU's backward reads its output, which is fc2's input.
    found += _linear(trained, fc2, 0 if activation and arch.activation == "relu" else inner, tj * fc2 * e)
    if trained and e < 4:
        # Weights are fp32 and cast where they are used; backward multiplies with the cast.
        found += e * sum(linear.weights // n for linear in kind.linears.values())
    found += sum(job.footprint.saved_behind_linear(job, linear, factors) for linear, factors in layer.linears)
    return found + job.footprint.saved_by_layer(job, input_requires_grad)


def _norms(layer: Layer, input_requires_grad: bool, needs: Mapping[str, bool]) -> int:
    """Return how many norms of the residual stream save their input. needs: `gradients` of the layer."""
    into = {
        "input_layernorm": input_requires_grad,
        "post_self_attn_layernorm": needs["linear_fc1"],
        "pre_mlp_layernorm": needs["linear_fc1"],
        "post_mlp_layernorm": needs["linear_fc2"] or bool(layer.on("linear_fc2")),
    }
    return sum(requires_grad and layer.kind.has(norm) for norm, requires_grad in into.items())


def bytes_outside_graph(job: Job, layer: Layer) -> int:
    """Return the bytes of `saved_of_layer` that are kept until backward ends, even with recomputation.

    A method saves these for a product that came out of a collective (parallel/update.py).
    """
    if not job.sequence_parallel:
        return 0
    rows = ((linear, factors) for linear, factors in layer.linears if linear.kind == "row")
    return sum(job.footprint.saved_behind_linear(job, linear, factors) for linear, factors in rows)


def widths(job: Job) -> int:
    """Return the number of ffn-wide tensors that the activation saves.

    Gated activations other than SwiGLU use Megatron's expression, which saves all its steps.
    """
    if not job.architecture.gated:
        return 1
    return 2 if job.architecture.activation == "silu" else 4


def _linear(trained: bool, rank: int, x: int, u: int) -> int:
    """Return what a linear saves: a trained or adapted one its input, an adapted one also U, a frozen one nothing."""
    return x + u if trained or rank else 0


def norm_saves(job: Job, rows: int, features: int) -> int:
    """Return the bytes that a norm saves: its input and one or two statistics of each row.

    PyTorch's RMSNorm is fused on CUDA; on a CPU it is composed of simple operators and saves the input in fp32. Where
    the weight is trained, a norm also saves the weight's cast, and a composed one the tensor that it multiplies with
    the weight.
    """
    layer_norm = job.architecture.norm == "LayerNorm"
    itemsize, cast = 4 if written_out(job) else job.itemsize, 0
    if job.footprint.trains_base:
        itemsize += 4 * _composed(job)
        cast = norm_elements(job.architecture) * job.itemsize * (job.itemsize < 4)
    return cast + rows * features * itemsize + rows * (2 * job.itemsize if layer_norm else 4)


def _composed(job: Job) -> bool:
    """Return whether norms are composed of simple operators, as PyTorch's RMSNorm on a CPU (not one of 1 + weight)."""
    return job.device == "cpu" and job.architecture.norm == "RMSNorm" and not job.architecture.zero_centered_norm


def written_out(job: Job) -> bool:
    """Return whether norms save a copy of their input in fp32 instead of the input."""
    return _composed(job) and job.itemsize < 4


def _attention(job: Job, kind: LayerKind, heads_out: int) -> int:
    """Return the bytes of q, k, v, output and log Σ exp of flash attention.

    v is a view of the fused q, k, v and keeps it alive.
    """
    arch, n, e, t = job.architecture, job.layout.tensor, job.itemsize, job.tokens
    whole_heads = arch.kv_heads >= n
    fused = t * kind.linears["linear_qkv"].out_features // (n if whole_heads else 1) * e
    keys = t * max(1, arch.kv_heads // n) * arch.head_dim * e
    found = fused + heads_out + 4 * t * arch.heads // n
    # The q of several groups lie apart in the fused tensor, with k and v between them, so q is a copy. It is a view
    # where the rank has one group or a group has one query head.
    copied = whole_heads and arch.kv_heads // n > 1 and arch.heads > arch.kv_heads
    if kind.rope is not None:
        found += heads_out + keys  # rotated q and k
    elif copied:
        found += heads_out
    return found + head_norms(job, kind, copied)


def head_norms(job: Job, kind: LayerKind, copied: bool) -> int:
    """Return the bytes that the norms of q and k save beside the fused q, k, v, which is kept alive.

    copied: q is a copy and not a view of the fused tensor.
    """
    arch, n, e, t = job.architecture, job.layout.tensor, job.itemsize, job.tokens
    if not (arch.qk_norm or kind.norms_all_heads):
        return 0
    in_fp32 = written_out(job)
    queries = t * (arch.heads // n if arch.kv_heads >= n else arch.heads // arch.kv_heads) * arch.head_dim * e
    keys = t * max(1, arch.kv_heads // n) * arch.head_dim * e
    if kind.norms_all_heads:
        weights = (arch.heads // n + (arch.kv_heads // n or arch.kv_heads)) * arch.head_dim
        cast = weights * e * (job.footprint.trains_base and e < 4)
        return cast + (queries if copied else 0) + 8 * t
    widths = 4 // e if in_fp32 else 1
    # Norms composed of simple operators save fp32 copies of q and k. Others save views of the fused tensor or q's copy.
    found = (queries + keys) * widths if in_fp32 else (queries if copied else 0)
    if job.footprint.trains_base and _composed(job):
        found += (queries + keys) * 4 // e
    return found + 4 * (queries + keys) // (arch.head_dim * e)


def activations(job: Job, *, recompute: bool) -> int:
    """Return the bytes saved for the backward of one microbatch. recompute: as in `kept_of_layer`."""
    found = sum(
        count * kept_of_layer(job, layer, input_requires_grad, recompute=recompute)
        for layer, input_requires_grad, count in job.placement.kinds
    )
    if job.placement.trains:
        # The final norm's input, and the head's gradient at the targets, which is formed in forward.
        found += (
            norm_saves(job, job.shard_tokens, job.architecture.hidden)
            + job.targets * job.architecture.hidden * job.itemsize
        )
    if job.footprint.trains_base:
        # The gradient of the head's weight, formed in forward too; ids and mask of the lookup in a shard of the
        # embeddings; and the buffer in which Megatron gathers the inputs of trained linears.
        found += head_rows(job) * job.architecture.hidden * job.itemsize
        found += 9 * job.tokens * (job.layout.tensor > 1)
        found += job.tokens * job.architecture.hidden * job.itemsize * job.sequence_parallel
    found += job.footprint.saved_by_model(job, recompute)
    rotated_back = {
        layer.kind.rope
        for layer, input_requires_grad, _ in job.placement.kinds
        if layer.kind.rope is not None and gradients(layer, input_requires_grad)["linear_proj"]
    }
    # cos and sin of half the rotated columns each; packed rows have positions of their own.
    rows = job.layout.micro_batch if job.packing else 1
    columns = sum(rope.rotated(job.architecture.head_dim) for rope in rotated_back)
    return found + rows * job.sequence_length * columns * job.itemsize + _window_masks(job)


def _window_masks(job: Job) -> int:
    """Return the bytes of the additive masks of sliding windows; layers of one window share a mask."""
    windows = {kind.sliding_window for kind in job.architecture.kinds} - {None}
    masks = ((min(WINDOW_BLOCK, window), window) for window in windows if window and windowed(job, window))
    return sum(block * (block + window - 1) * job.itemsize for block, window in masks)


def windowed(job: Job, window: int | None) -> bool:
    """Return whether the longest sample exceeds a layer's sliding window."""
    return window is not None and job.sequence_length > window


def kept_of_layer(job: Job, layer: Layer, input_requires_grad: bool, *, recompute: bool) -> int:
    """Return the bytes that a layer keeps from its forward to its backward; 0 where it has no backward.

    With recomputation: its input, and U_j of its row-parallel linears. ReduceExpand keeps U_j outside the graph so that
    recomputation does not issue the reduction again (parallel/autograd.py).
    """
    if not (input_requires_grad or layer.adapted):
        return 0
    if not recompute:
        return saved_of_layer(job, layer, input_requires_grad)
    rows = sum(total_rank(factors) for linear, factors in layer.linears if linear.kind == "row")
    columns = job.architecture.hidden + (rows if job.sequence_parallel else 0)
    return job.shard_tokens * columns * job.itemsize + bytes_outside_graph(job, layer)
