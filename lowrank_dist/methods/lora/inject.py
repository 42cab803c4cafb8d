"""Give a frozen, sharded model its low-rank factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_dist.arch.placement import FactorSpec, LinearPlacement
from lowrank_dist.arch.tensors import MEGATRON_LINEARS
from lowrank_dist.parallel.factors import FactorShard, LowRankFactors
from lowrank_dist.parallel.masks import MaskSource, stream_of
from lowrank_dist.parallel.theta import drawn_by_name


@dataclass(frozen=True)
class AdaptedLinear:
    """One linear's placement together with the factors that this rank holds for it."""

    placement: LinearPlacement
    factors: LowRankFactors


def theta_of(adapted: Sequence[AdaptedLinear]) -> list[nn.Parameter]:
    """Θ on this rank: A and B of every linear in turn, which is the order that optimiser and checkpoints go by."""
    return [p for linear in adapted for p in (linear.factors.lora_A, linear.factors.lora_B)]


def inject(
    model: nn.Module,
    placements: Sequence[LinearPlacement],
    masks: MaskSource,
    seed: int,
    tp_rank: int,
    tp_size: int,
    lanes: bool = False,
) -> tuple[AdaptedLinear, ...]:
    """Attach factors to the model's linears and initialise them as PEFT does, whatever the tensor-parallel size.

    lanes: see parallel/lanes.py.
    """
    adapted = []
    for placement in placements:
        linear = model.get_submodule(MEGATRON_LINEARS[placement.linear].format(layer=placement.layer))
        sharded_a = placement.layout.kind == "row"
        k = placement.layout.in_features // (tp_size if sharded_a else 1)
        factors = LowRankFactors(
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
        linear.attach(factors, masks, stream_of(placement.layer, placement.linear), lanes)
        adapted.append(AdaptedLinear(placement, factors))
    return tuple(adapted)


def initial_a(spec: FactorSpec, seed: int) -> Tensor:
    """[r, in]: PEFT's kaiming_uniform(a=√5), that is U(−1/√in, 1/√in), over the full matrix; B starts at zero.

    Drawn from (seed, module path) alone: a shard is a slice of it, so the spread does not grow with N.
    """
    return drawn_by_name(spec.path, seed, spec.rank, spec.in_features)


def shards_of(placement: LinearPlacement, tp_rank: int, tp_size: int) -> list[FactorShard]:
    """Which rows of each factor's B lie on a rank; a pure function, so that any rank can tell for all."""
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
                spec.rank,
                spec.scale,
                local_rows=tuple(local for _, local in rows),
                factor_rows=tuple(row for row, _ in rows),
            )
        )
    return shards
