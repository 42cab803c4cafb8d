"""Weight-decomposed updates: DoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, eq. 5 and 11).

    y = g ⊙ (W·x + s·B·A·drop(x)) + bias,      g = m / ‖W + s·B·A‖, row by row

The magnitude m is trained; the norm is detached; s is the scale. The norm changes only with the factors, so it is
computed once per optimizer step and not in the forward pass. No layer gains a collective: ranks that hold part of the
columns sum their squared norms in one reduction for the whole model.

Scaling is linear, so it may come before the reduction of a row-parallel linear: m's gradient is then a partial sum over
ranks, as B's is. With dropout PEFT computes a different function, base(x) + (g − 1)·base(drop(x)) + …; without dropout
the two agree.

Legend: T tokens, O outputs and K inputs of this rank's weight, n rows of it that the factors cover.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lowrank_dist.parallel.collectives import all_reduce
from lowrank_dist.parallel.coordinates import RankCoordinates
from lowrank_dist.parallel.factors import FactorMap, FactorShard, LowRankFactors
from lowrank_dist.parallel.frozen import FrozenWeight
from lowrank_dist.parallel.linear import LowRankLinear
from lowrank_dist.parallel.theta import LocalShard, TensorSlice, TrainedParameter, mark

# Elements of a weight or of outputs that are processed in fp32 at a time.
_CHUNK_ELEMENTS = 2**22


class DecomposedFactors(LowRankFactors):
    """Packed factors and the magnitudes of the rows that they cover: `magnitude` [n], in the order of B's rows.

    The constructor fills magnitudes, norms and gains with NaN; `refresh_norms` and then `start` set them.
    """

    rescales: ClassVar[bool] = True
    covered: Tensor
    norm: Tensor
    gain: Tensor

    def __init__(
        self,
        shards: Sequence[FactorShard],
        in_features: int,
        out_features: int,
        *,
        sharded_a: bool,
        device: torch.device,
    ) -> None:
        super().__init__(shards, in_features, out_features, sharded_a=sharded_a, device=device)
        rows = [row for shard in self.shards for row in shard.local_rows]

        def unset(size: int) -> Tensor:
            return torch.full((size,), torch.nan, dtype=torch.float32, device=device)

        # A rank without a row keeps one element that nothing reads, as in lora_B.
        self.magnitude = nn.Parameter(unset(max(1, len(rows))) if rows else torch.zeros(1, device=device))
        mark(self.magnitude, sharded=not sharded_a, partial=sharded_a)
        self.register_buffer("covered", torch.tensor(rows, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("norm", unset(len(rows)), persistent=False)
        # g of every output, in fp32: in bf16, g near 1 would lose every change below 2⁻⁸.
        self.register_buffer("gain", unset(out_features), persistent=False)

    @torch.no_grad()
    def squared_norms(self, weight: FrozenWeight) -> Tensor:
        """Return [n]: Σ (W + s·B·A)² over this rank's columns, in fp32 (fp64 with factors in fp64)."""
        a_RK, b_OR = self.scaled_a(self.lora_A.dtype, None), self.dense_bt(self.lora_A.dtype).t()
        rows, step = self.out_features, max(1, _CHUNK_ELEMENTS // a_RK.size(1))
        squares = []
        for at in range(0, rows, step):
            part = weight.rows(at, min(at + step, rows)).to(a_RK.dtype)
            squares.append(torch.addmm(part, b_OR[at : at + step], a_RK).square_().sum(1))
        return torch.cat(squares)[self.covered]

    @torch.no_grad()
    def set_norms(self, squares: Tensor) -> None:
        """Set the norms, and the gains that follow from them, from the squared norms [n] over all columns."""
        # Squares underflow before norms do, so the clamp comes before the root. Clamped after it, a row whose squares
        # underflow would get a norm far too small, and dm, which divides by the norm, would be far too large. A row of
        # zeros stays zero as long as the factors add nothing.
        self.norm.copy_(squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt_())
        self.gain.fill_(1)
        self.gain[self.covered] = self.magnitude[: self.covered.numel()] / self.norm

    @torch.no_grad()
    def start(self) -> None:
        """Set the magnitudes to the norms, so that g = 1."""
        self.magnitude[: self.covered.numel()] = self.norm
        self.gain.fill_(1)

    def rescaled(self, z: Tensor, bias: Tensor | None, *, outside_graph: bool) -> Tensor:
        y: Tensor = _Rescale.apply(z, self, outside_graph, self.magnitude)
        return y if bias is None else y + bias

    def magnitude_gradient(self, dy: Tensor, z: Tensor) -> Tensor:
        """Return dm [n] = Σ_t dy ⊙ z / ‖W + s·B·A‖ in fp32, summed over this rank's tokens."""
        dy_TO, z_TO = dy.flatten(0, -2), z.flatten(0, -2)
        total = torch.zeros(self.out_features, dtype=self.magnitude.dtype, device=dy.device)
        step = max(1, _CHUNK_ELEMENTS // self.out_features)
        for mine, theirs in zip(dy_TO.split(step), z_TO.split(step), strict=True):
            total += (mine.to(total.dtype) * theirs).sum(0)
        gradient = torch.zeros_like(self.magnitude)
        gradient[: self.covered.numel()] = total[self.covered] / self.norm
        return gradient

    def trained(self, factor_map: FactorMap) -> tuple[TrainedParameter, ...]:
        """Return A, B and the magnitudes, which are stored as `<module path>.lora_magnitude_vector` [out]."""
        whole = {
            f"{shard.name}.lora_magnitude_vector": (rows,)
            for shard, (rows, _) in zip(self.shards, factor_map.shapes, strict=True)
        }
        return *super().trained(factor_map), TrainedParameter(
            self.magnitude, whole, partial(_shard_of_magnitude, factor_map)
        )


def _shard_of_magnitude(factor_map: FactorMap, coordinates: RankCoordinates) -> LocalShard:
    slices, first = [], 0
    for shard in factor_map.shards(coordinates.dense.tp):
        part = slice(first, first + len(shard.factor_rows))
        slices.append(
            TensorSlice(f"{shard.name}.lora_magnitude_vector", (list(shard.factor_rows),), partial(_part, part))
        )
        first = part.stop
    return LocalShard((max(1, first),), tuple(slices))


def _part(part: slice, local: Tensor) -> Tensor:
    return local[part]


def _scaled(x: Tensor, gain: Tensor) -> Tensor:
    """Return gain ⊙ X in X's dtype, computed in the wider of the two dtypes and rounded once."""
    return torch.mul(x, gain, out=torch.empty_like(x))


class _Rescale(torch.autograd.Function):
    """Y = g ⊙ Z. Backward returns dZ = g ⊙ dY and dm, for which it needs Z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, update: DecomposedFactors, outside_graph: bool, magnitude: Tensor) -> Tensor:
        ctx.update, ctx.outside_graph = update, z.detach() if outside_graph else None
        if not outside_graph:
            ctx.save_for_backward(z)
        return _scaled(z, update.gain)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        update = ctx.update
        (z,) = (ctx.outside_graph,) if ctx.outside_graph is not None else ctx.saved_tensors
        dz = _scaled(dy, update.gain) if ctx.needs_input_grad[0] else None
        dm = update.magnitude_gradient(dy, z) if ctx.needs_input_grad[3] else None
        return dz, None, None, dm


def start_magnitudes(linears: Sequence[LowRankLinear], group: ProcessGroup) -> None:
    """Set every magnitude to the norm of its row under the present factors. Collective over `group`."""
    refresh_norms(linears, group)
    for linear in linears:
        assert isinstance(linear.update, DecomposedFactors), "refresh_norms has checked this"
        linear.update.start()


def refresh_norms(linears: Sequence[LowRankLinear], group: ProcessGroup) -> None:
    """Compute the norms of decomposed updates from their present factors. One reduction over `group` for all linears.

    Only row-parallel linears need the reduction: each rank of the group holds a part of their columns.
    """
    squares = []
    for linear in linears:
        update, frozen = linear.update, linear.frozen
        assert isinstance(update, DecomposedFactors) and frozen is not None, "only linears with a decomposed update"
        squares.append((linear.kind, update, update.squared_norms(frozen)))
    partial_sums = [each for kind, _, each in squares if kind == "row"]
    if partial_sums and group.size() > 1:
        flat = torch.cat(partial_sums)
        all_reduce(flat, group).wait()
        for partial_sum, whole in zip(partial_sums, flat.split([each.numel() for each in partial_sums]), strict=True):
            partial_sum.copy_(whole)
    for _, update, each in squares:
        update.set_norms(each)
