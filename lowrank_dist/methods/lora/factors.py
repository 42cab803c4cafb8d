"""The low-rank factors of a model: injection into its linears, their shards on the ranks, and the unsharded factors.

Unsharded ("whole") factors have Hugging Face names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_dist.arch.placement import FactorSpec, LinearPlacement
from lowrank_dist.methods.lora.files import LowRankFactor
from lowrank_dist.parallel.factors import FactorMap, FactorShard, LowRankFactors
from lowrank_dist.parallel.linear import LowRankLinear
from lowrank_dist.parallel.masks import MaskSource, stream_of
from lowrank_dist.parallel.theta import Theta, drawn_by_name


@dataclass(frozen=True)
class AdaptedLinear:
    """The placement of one linear and this rank's factors for it."""

    placement: LinearPlacement
    factors: LowRankFactors


def inject(
    model: nn.Module,
    placements: Sequence[LinearPlacement],
    masks: MaskSource,
    seed: int,
    tp_rank: int,
    tp_size: int,
    fuse_factors: bool = False,
    kind: type[LowRankFactors] = LowRankFactors,
) -> tuple[AdaptedLinear, ...]:
    """Attach factors to the model's linears and initialise them as PEFT does, equally at every tensor-parallel size.

    fuse_factors: see parallel/frozen.py. kind: the class of the updates. Magnitudes stay unset until
    `start_magnitudes`.
    """
    adapted = []
    for placement in placements:
        linear = model.get_submodule(placement.layout.module_of(placement.layer))
        assert isinstance(linear, LowRankLinear), "the model is built with linears that take factors"
        sharded_a = placement.layout.kind == "row"
        k = placement.layout.in_features // (tp_size if sharded_a else 1)
        factors = kind(
            shards_of(placement, tp_rank, tp_size),
            k,
            linear.weight.size(0),
            sharded_a=sharded_a,
            device=linear.weight.device,
        )
        columns = slice(tp_rank * k, (tp_rank + 1) * k) if sharded_a else slice(None)
        with torch.no_grad():
            for index, spec in enumerate(placement.factors):
                factors.a_of(index).copy_(initial_a(spec, seed)[:, columns])
        linear.attach(factors, masks, stream_of(placement.layer, placement.layout.stream), fuse_factors)
        adapted.append(AdaptedLinear(placement, factors))
    return tuple(adapted)


def initial_a(spec: FactorSpec, seed: int) -> Tensor:
    """Return the initial A [r, in]: PEFT's kaiming_uniform(a=√5), that is U(−1/√in, 1/√in). B starts at zero.

    The whole matrix is drawn from (seed, module path) and a shard is a slice of it, so values and bound do not depend
    on the number of ranks.
    """
    return drawn_by_name(spec.path, seed, spec.adapter_rank, spec.in_features)


def shards_of(placement: LinearPlacement, tp_rank: int, tp_size: int) -> list[FactorShard]:
    """Return the rows of each factor's B on rank `tp_rank`. It is pure, so any rank can compute it for any other.

    It is called on demand: the lists of a large model for all ranks would take a GB.
    """
    segments = placement.layout.segments(tp_rank, tp_size)
    shards = []
    for spec in placement.factors:
        first_row = dict(spec.parts)
        rows = sorted(
            (first_row[segment.part] + segment.part_start + i, segment.local_start + i)
            for segment in segments
            if segment.part in first_row
            for i in range(segment.length)
        )
        shards.append(
            FactorShard(
                spec.path,
                spec.adapter_rank,
                spec.scale,
                local_rows=tuple(local for _, local in rows),
                factor_rows=tuple(row for row, _ in rows),
            )
        )
    return shards


@dataclass(frozen=True)
class WholeFactor:
    """The unsharded A [r, in] and B [out, r] of one factor, and its magnitude [out] if it has one, on the CPU."""

    spec: FactorSpec
    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


def lora_theta(adapted: Sequence[AdaptedLinear], tp_size: int, masks: MaskSource) -> Theta:
    """Return Θ of the low-rank updates, linear by linear, stored under Hugging Face module names."""
    trained = (each for linear in adapted for each in linear.factors.trained(_everywhere(linear.placement, tp_size)))
    return Theta(tuple(trained), masks)


def _everywhere(placement: LinearPlacement, tp_size: int) -> FactorMap:
    shapes = tuple((spec.rows, spec.adapter_rank) for spec in placement.factors)
    return FactorMap(shapes, placement.layout.in_features, partial(shards_of, placement, tp_size=tp_size))


def stored_tensors(factors: Mapping[str, LowRankFactor]) -> dict[str, Tensor]:
    """Return unsharded tensors by their stored names in `lora_theta`, from factors by module path."""
    return {
        f"{path}.lora_{name}": tensor
        for path, factor in factors.items()
        for name, tensor in zip(("A", "B", "magnitude_vector"), factor.tensors, strict=False)
    }


def whole_factors(placements: Sequence[LinearPlacement], tensors: Mapping[str, Tensor]) -> dict[str, WholeFactor]:
    """Return module path → unsharded factor, from the stored tensors of `lora_theta`."""
    return {
        spec.path: WholeFactor(
            spec,
            tensors[f"{spec.path}.lora_A"],
            tensors[f"{spec.path}.lora_B"],
            tensors.get(f"{spec.path}.lora_magnitude_vector"),
        )
        for placement in placements
        for spec in placement.factors
    }


def adapter_factors(whole: Mapping[str, WholeFactor]) -> dict[str, LowRankFactor]:
    """Return one factor per Hugging Face module.

    Parts of one module (q_proj, k_proj, v_proj inside GPT-2's c_attn) become one factor of rank R = Σ r: the A are
    stacked, B is zero outside each part's block, and alpha gives the scale of the first part. Where another part has
    another scale, the ratio is folded into its block of B.
    """
    modules: dict[str, list[WholeFactor]] = {}
    for factor in whole.values():
        modules.setdefault(factor.spec.export_path, []).append(factor)
    return {path: _as_module(members) for path, members in modules.items()}


def _as_module(members: Sequence[WholeFactor]) -> LowRankFactor:
    first = members[0].spec
    if len(members) == 1 and first.rows == first.export_rows:
        return LowRankFactor(members[0].a, members[0].b, first.alpha, members[0].magnitude)
    total = sum(member.spec.adapter_rank for member in members)
    b, column = members[0].b.new_zeros(first.export_rows, total), 0
    magnitude = None if members[0].magnitude is None else b.new_empty(first.export_rows)
    for member in members:
        spec = member.spec
        rows = slice(spec.export_row, spec.export_row + spec.rows)
        b[rows, column : column + spec.adapter_rank] = member.b * (spec.scale / first.scale)
        if magnitude is not None and member.magnitude is not None:
            magnitude[rows] = member.magnitude
        column += spec.adapter_rank
    # s = alpha / r, or alpha / √r with rsLoRA: solved for alpha at rank R.
    alpha = first.scale * (math.sqrt(total) if first.rslora else total)
    return LowRankFactor(torch.cat([member.a for member in members]), b, alpha, magnitude)
