"""The low-rank factors of a model: injected into its linears, where they lie on the ranks, and whole.

Whole factors have Hugging Face names, and no sharding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import torch
from torch import Tensor, nn

from lowrank_dist.arch.placement import FactorSpec, LinearPlacement
from lowrank_dist.methods.lora.files import LowRankFactor
from lowrank_dist.parallel.factors import FactorShard, LowRankFactors, a_of, b_elements, b_of
from lowrank_dist.parallel.linear import LowRankLinear
from lowrank_dist.parallel.masks import MaskSource, stream_of
from lowrank_dist.parallel.theta import Held, Piece, Theta, drawn_by_name, scatter


@dataclass(frozen=True)
class AdaptedLinear:
    """One linear's placement together with the factors that this rank holds for it."""

    placement: LinearPlacement
    factors: LowRankFactors


def theta_of(adapted: Sequence[AdaptedLinear]) -> list[nn.Parameter]:
    """Return Θ on this rank: A and B of every linear in turn, the order that optimiser and checkpoints go by."""
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

    lanes: see parallel/factors.py.
    """
    adapted = []
    for placement in placements:
        linear = model.get_submodule(placement.layout.module_of(placement.layer))
        assert isinstance(linear, LowRankLinear), "the model is built with linears that take factors"
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
        linear.attach(factors, masks, stream_of(placement.layer, placement.layout.stream), lanes)
        adapted.append(AdaptedLinear(placement, factors))
    return tuple(adapted)


def initial_a(spec: FactorSpec, seed: int) -> Tensor:
    """Return [r, in]: PEFT's kaiming_uniform(a=√5), that is U(−1/√in, 1/√in), over the full matrix; B starts at zero.

    Drawn from (seed, module path) alone: a shard is a slice of it, so the spread does not grow with N.
    """
    return drawn_by_name(spec.path, seed, spec.rank, spec.in_features)


def shards_of(placement: LinearPlacement, tp_rank: int, tp_size: int) -> list[FactorShard]:
    """Return the rows of each factor's B on a rank; a pure function, so that any rank can tell for all."""
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


@dataclass(frozen=True)
class WholeFactor:
    """A [r, in] and B [out, r] of one factor, unsharded, on the CPU."""

    spec: FactorSpec
    a: Tensor
    b: Tensor


def lora_theta(adapted: Sequence[AdaptedLinear], tp_size: int, masks: MaskSource) -> Theta:
    """Return Θ of low-rank updates: A and B of every linear in turn, stored under Hugging Face's module names."""
    shapes: list[dict[str, tuple[int, ...]]] = []
    for linear in adapted:
        specs = linear.placement.factors
        shapes.append({f"{spec.path}.lora_A": (spec.rank, spec.in_features) for spec in specs})
        shapes.append({f"{spec.path}.lora_B": (spec.rows, spec.rank) for spec in specs})

    return Theta(tuple(theta_of(adapted)), tuple(shapes), lambda tp_rank: _Layout(adapted, tp_rank, tp_size), masks)


class _Layout(Sequence[Held]):
    """The layout of a rank, made as it is asked for.

    The rows of every factor of a large model, on every rank, would fill a GB of lists.
    """

    def __init__(self, adapted: Sequence[AdaptedLinear], tp_rank: int, tp_size: int) -> None:
        self._adapted, self._tp_rank, self._tp_size = adapted, tp_rank, tp_size

    def __len__(self) -> int:
        return 2 * len(self._adapted)

    @overload
    def __getitem__(self, number: int) -> Held: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Held]: ...

    def __getitem__(self, number: int | slice) -> Held | Sequence[Held]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        linear = self._adapted[number // 2]
        shards = shards_of(linear.placement, self._tp_rank, self._tp_size)
        a, b = _pieces(linear, shards, self._tp_rank)
        if number % 2:
            return Held((max(1, b_elements(shards)),), b)
        return Held(tuple(linear.factors.lora_A.shape), a)


def _pieces(
    linear: AdaptedLinear, shards: Sequence[FactorShard], tp_rank: int
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Return the pieces of lora_A, cut by columns if row-parallel, and of lora_B, whose rows may be anywhere."""
    k = linear.factors.lora_A.size(1)
    sharded_a = linear.placement.layout.kind == "row"
    columns = slice(tp_rank * k, (tp_rank + 1) * k) if sharded_a else slice(None)
    a, b = [], []
    for index, shard in enumerate(shards):
        a.append(Piece(f"{shard.name}.lora_A", (slice(None), columns), partial(a_of, shards, index)))
        b.append(Piece(f"{shard.name}.lora_B", (list(shard.factor_rows),), partial(b_of, shards, index)))
    return tuple(a), tuple(b)


def spread_factors(adapted: Sequence[AdaptedLinear], tp_rank: int, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Set every factor from its whole (A, B), by module path, without communication."""
    named = {
        f"{path}.lora_{side}": tensor for path, pair in values.items() for side, tensor in zip("AB", pair, strict=True)
    }
    for linear in adapted:
        pieces = _pieces(linear, linear.factors.shards, tp_rank)
        for parameter, ours in zip((linear.factors.lora_A, linear.factors.lora_B), pieces, strict=True):
            scatter(ours, named, parameter)


def whole_factors(placements: Sequence[LinearPlacement], tensors: Mapping[str, Tensor]) -> dict[str, WholeFactor]:
    """Return module path → factor, from the stored tensors of `lora_theta`."""
    return {
        spec.path: WholeFactor(spec, tensors[f"{spec.path}.lora_A"], tensors[f"{spec.path}.lora_B"])
        for placement in placements
        for spec in placement.factors
    }


def adapter_factors(whole: Mapping[str, WholeFactor]) -> dict[str, LowRankFactor]:
    """Return the factors as Hugging Face modules hold them.

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
