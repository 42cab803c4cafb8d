"""FLOPs of a step: those executed, and those that the model needs (the numerator of MFU).

Frozen weights have no weight gradient, the lowest adapted linear forms no gradient of its input, nothing below it runs
backward, and only target positions reach the vocabulary projection. A multiply-add is two FLOPs; norms, activations and
softmax are left out. Causal attention counts the half of the scores that is computed; scores of a prefix count in full.

Legend: T tokens, n target tokens, H hidden, V vocabulary, r rank of a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.planner.factors import Layer, gradients
from lowrank_dist.planner.job import Footprint, LayerFlops


@dataclass(frozen=True)
class FlopCount:
    """FLOPs over all ranks. executed: with recomputation, and with flash attention's scores recomputed in backward.

    model: without either, as MFU is defined (Chowdhery et al., "PaLM", 2022, appendix B), and without the weight
    gradients that a frozen base does not have. attention: the part of `executed` that is attention's.
    """

    executed: int
    model: int
    attention: int


def step_flops(
    arch: Architecture,
    footprint: Footprint,
    *,
    tokens: int,
    target_tokens: int,
    square_lengths: Mapping[int | None, int],
    recompute: bool,
) -> FlopCount:
    """Return the FLOPs of forward and backward of `tokens` tokens, of which `target_tokens` are trained on.

    square_lengths: sliding window of a layer → Σ `attended_square` over the samples (`square_lengths_of`). Each sample
    attends within itself, without positions outside a row.
    The three arguments may be sums over any number of microbatches, steps and ranks, because the count is linear in
    them. Costs of a microbatch that do not depend on its tokens are not included (`Footprint.microbatch_flops`).
    """
    placement, trained = footprint.placement, footprint.trains_base
    vocabulary = 2 * target_tokens * arch.vocab * arch.hidden
    executed = model = vocabulary * (1 + placement.trains + trained)
    attention = 0
    for layer, input_requires_grad, count in placement.kinds:
        own = footprint.layer_flops(arch, tokens, input_requires_grad)
        forward_linears = 2 * tokens * layer.kind.weights
        shared = forward_linears + _low_rank_forward(layer, tokens)
        forward = shared + own.forward
        squares = square_lengths[layer.kind.sliding_window] + 2 * tokens * footprint.outside_row
        forward_attention = 2 * squares * arch.heads * arch.head_dim
        needs = gradients(layer, input_requires_grad)
        backward = sum(2 * tokens * layer.kind.linears[name].weights for name, dx in needs.items() if dx)
        backward += _low_rank_backward(layer, needs, tokens) + own.backward + forward_linears * trained
        model += count * (forward + backward + forward_attention * (3 if needs["linear_proj"] else 1))
        again = recompute and (input_requires_grad or layer.adapted)
        # Flash attention's backward: five products, the scores' among them, where forward has two.
        executed += count * (forward + backward + again * (shared + _again(layer, own)))
        attention += count * forward_attention * (1 + again)
        attention += count * forward_attention * 5 // 2 * needs["linear_proj"]
    return FlopCount(executed + attention, model, attention)


def attended_square(length: int, window: int | None) -> int:
    """Return twice the number of (query, key) pairs of a sample, up to a term linear in its length.

    That is length² under causal attention. window: the sliding window, or None.
    """
    return length**2 if window is None or length <= window else window * (2 * length - window)


def square_lengths_of(lengths: Mapping[int, int], arch: Architecture) -> dict[int | None, int]:
    """Return each sliding window of a layer → Σ `attended_square`. lengths: length of samples → their number."""
    windows = {kind.sliding_window for kind in arch.kinds}
    return {
        window: sum(count * attended_square(length, window) for length, count in lengths.items()) for window in windows
    }


def replicated_flops(arch: Architecture, footprint: Footprint, *, tokens: int, recompute: bool) -> int:
    """Return the FLOPs that every tensor-parallel rank repeats where there is no sequence parallelism.

    They are those of the replicated factors (A of column- and B of row-parallel linears) and of what the method
    replicates.
    """
    found = 0
    for layer, input_requires_grad, count in footprint.placement.kinds:
        own = footprint.layer_flops(arch, tokens, input_requires_grad)
        if own.replicated:
            found += count * (own.forward + _again(layer, own) * recompute + own.backward)
        forwards = 2 if recompute and (input_requires_grad or layer.adapted) else 1
        for (linear, factors), needs_dx in zip(
            layer.linears, gradients(layer, input_requires_grad).values(), strict=True
        ):
            column = linear.kind == "column"
            # The forward product, and in backward for A: dA, and dU·A where it is needed; for B: dU and dB.
            products = forwards + (1 + needs_dx if column else 2)
            side = sum(factor.adapter_rank * (factor.in_features if column else factor.rows) for factor in factors)
            found += count * products * 2 * tokens * side
    return found


def _again(layer: Layer, own: LayerFlops) -> int:
    """Return the FLOPs of the method's products that recomputation repeats.

    They are all of them where a norm is behind the MLP, because it saves its input.
    """
    return own.forward if layer.kind.has("post_mlp_layernorm") else own.again


def _low_rank_forward(layer: Layer, tokens: int) -> int:
    """Return the FLOPs of U = X·Aᵀ and U·Bᵀ."""
    return sum(2 * tokens * factor.elements for factors in layer.factors for factor in factors)


def _low_rank_backward(layer: Layer, needs: Mapping[str, bool], tokens: int) -> int:
    """Return the FLOPs of dU = dY·B, dA = dUᵀ·X, dB = dYᵀ·U, and of dU·A where the input needs a gradient."""
    found = 0
    for factors, needs_dx in zip(layer.factors, needs.values(), strict=True):
        for factor in factors:
            on_rows, on_inputs = factor.adapter_rank * factor.rows, factor.adapter_rank * factor.in_features
            found += 2 * tokens * (2 * on_rows + (2 if needs_dx else 1) * on_inputs)
    return found
