"""Θ without its sharding: whole factors under Hugging Face names, gathered from and spread over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lowrank_dist.checkpoint.adapter import LowRankFactor
from lowrank_dist.lora.inject import AdaptedLinear
from lowrank_dist.lora.placement import FactorSpec

Select = Callable[[torch.nn.Parameter], Tensor]


@dataclass(frozen=True)
class WholeFactor:
    """A [r, in] and B [out, r] of one factor, unsharded, on the CPU."""

    spec: FactorSpec
    a: Tensor
    b: Tensor


def gather_factors(
    adapted: Sequence[AdaptedLinear], tp_group: ProcessGroup, select: Select = lambda parameter: parameter.detach()
) -> dict[str, WholeFactor]:
    """Every factor, whole, by module path; collective over the tensor-parallel group.

    `select` takes a parameter to what is gathered: itself, its gradient, an optimiser moment of its shape.
    A shard lands in zeros and the ranks are summed, which is exact: each element lies on one rank only.
    """
    whole = {}
    for linear in adapted:
        factors, sharded_a = linear.factors, linear.placement.layout.kind == "row"
        source_a, source_b = select(factors.lora_A), select(factors.lora_B)
        for index, spec in enumerate(linear.placement.factors):
            a, b = factors.a_of(index, source_a), factors.b_of(index, source_b)
            rows = torch.tensor(factors.shards[index].factor_rows, dtype=torch.int64, device=a.device)
            if sharded_a:
                whole_a, whole_b = a.new_zeros(spec.rank, spec.in_features), b.clone()
                whole_a.narrow(1, tp_group.rank() * a.size(1), a.size(1)).copy_(a)
            else:
                whole_a, whole_b = a.clone(), b.new_zeros(spec.rows, spec.rank)
                whole_b[rows] = b
            if tp_group.size() > 1:
                dist.all_reduce(whole_a if sharded_a else whole_b, group=tp_group)
            whole[spec.path] = WholeFactor(spec, whole_a.cpu(), whole_b.cpu())
    return whole


def spread_factors(adapted: Sequence[AdaptedLinear], tp_rank: int, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Set every factor from its whole (A, B); the inverse of `gather_factors`, without communication."""
    with torch.no_grad():
        for linear in adapted:
            factors, sharded_a = linear.factors, linear.placement.layout.kind == "row"
            for index, spec in enumerate(linear.placement.factors):
                whole_a, whole_b = values[spec.path]
                a, b = factors.a_of(index), factors.b_of(index)
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
