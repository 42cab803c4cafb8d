"""Θ without its sharding: whole factors under Hugging Face names, joined from and spread over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dist.checkpoint.adapter import LowRankFactor
from lowrank_dist.lora.inject import AdaptedLinear
from lowrank_dist.lora.placement import FactorSpec
from lowrank_dist.parallel.factors import FactorShard, a_of, b_of

Select = Callable[[torch.nn.Parameter], Tensor]


@dataclass(frozen=True)
class WholeFactor:
    """A [r, in] and B [out, r] of one factor, unsharded, on the CPU."""

    spec: FactorSpec
    a: Tensor
    b: Tensor


def join_factors(
    linear: AdaptedLinear, layout: Sequence[Sequence[FactorShard]], held: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, WholeFactor]:
    """The factors of a linear, whole, by module path, from what each tensor-parallel rank holds of them.

    layout: `shards_of` each rank. held: `lora_A` and `lora_B` there, or moments of their shapes, on the CPU; of a
    replicated one rank 0's is taken.
    """
    whole = {}
    for index, spec in enumerate(linear.placement.factors):
        if linear.placement.layout.kind == "row":
            a = torch.cat([a_of(shards, index, a) for shards, (a, _) in zip(layout, held, strict=True)], dim=1)
            b = b_of(layout[0], index, held[0][1])
        else:
            a, b = a_of(layout[0], index, held[0][0]), torch.zeros(spec.rows, spec.rank)
            for shards, (_, flat) in zip(layout, held, strict=True):
                b[list(shards[index].factor_rows)] = b_of(shards, index, flat)
        whole[spec.path] = WholeFactor(spec, a.contiguous(), b.contiguous())
    return whole


def spread_factors(
    adapted: Sequence[AdaptedLinear],
    tp_rank: int,
    values: Mapping[str, tuple[Tensor, Tensor]],
    select: Select = lambda parameter: parameter.detach(),
) -> None:
    """Set every factor from its whole (A, B); the inverse of `join_factors`, without communication.

    `select` takes a parameter to what is set: itself, or a tensor of its shape.
    """
    with torch.no_grad():
        for linear in adapted:
            factors, sharded_a = linear.factors, linear.placement.layout.kind == "row"
            into_a, into_b = select(factors.lora_A), select(factors.lora_B)
            for index, spec in enumerate(linear.placement.factors):
                whole_a, whole_b = values[spec.path]
                a, b = factors.a_of(index, into_a), factors.b_of(index, into_b)
                a.copy_(whole_a.narrow(1, tp_rank * a.size(1), a.size(1)) if sharded_a else whole_a)
                b.copy_(whole_b[list(factors.shards[index].factor_rows)])


def adapter_factors(whole: Mapping[str, WholeFactor]) -> dict[str, LowRankFactor]:
    """The factors as Hugging Face modules hold them.

    Parts of one module (q_proj, k_proj, v_proj inside GPT-2's c_attn) become one factor of rank R = Σ r: A stacked, B
    zero outside its block, alpha set so that the module keeps the first part's scale (a part of another scale has the
    ratio folded into its B).
    """
    modules: dict[str, list[WholeFactor]] = {}
    for factor in whole.values():
        modules.setdefault(factor.spec.export_path, []).append(factor)
    return {path: _as_module(members) for path, members in modules.items()}


def _as_module(members: Sequence[WholeFactor]) -> LowRankFactor:
    first = members[0].spec
    if len(members) == 1 and first.rows == first.export_rows:
        return LowRankFactor(members[0].a, members[0].b, first.alpha)
    total = sum(member.spec.rank for member in members)
    b, column = members[0].b.new_zeros(first.export_rows, total), 0
    for member in members:
        spec = member.spec
        block = member.b * (spec.scale / first.scale)
        b[spec.export_row : spec.export_row + spec.rows, column : column + spec.rank] = block
        column += spec.rank
    # s = alpha / r, or alpha / √r with rsLoRA: alpha grows with that power of the rank to keep s.
    alpha = first.scale * (math.sqrt(total) if first.rslora else total)
    return LowRankFactor(torch.cat([member.a for member in members]), b, alpha)
