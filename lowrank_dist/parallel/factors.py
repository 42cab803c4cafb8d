"""The low-rank factors of one fused linear on one rank: packed storage of A and B, and the operands made from them.

Legend: R = Σ r over the factors of this linear, K inputs and O outputs of this rank's shard; s scale, p probability and
m mask of dropout; a = s/(1−p)·A [R, K]; b = block-diagonal B [O, R].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_dist.ops.mask import Mask
from lowrank_dist.parallel.coordinates import RankCoordinates
from lowrank_dist.parallel.theta import LocalShard, TensorSlice, TrainedParameter, is_sharded, mark
from lowrank_dist.parallel.update import LowRankUpdate


@dataclass(frozen=True)
class FactorShard:
    """The share of one factor (A and B) on this rank: its adapter rank r, its scale, and the rows of B that lie here.

    `local_rows[i]` is a row of this rank's fused weight, `factor_rows[i]` the same row in the factor's own full
    [out, r] matrix B. Both are empty where this rank holds no row of the factor (fewer KV heads than ranks).
    """

    name: str
    adapter_rank: int
    scale: float
    local_rows: tuple[int, ...]
    factor_rows: tuple[int, ...]


@dataclass(frozen=True)
class FactorMap:
    """The placement of the factors of one linear on all ranks.

    shapes: shape [out, r] of each factor's whole B, in the order of the shards. in_features: columns of every whole A.
    shards: function from tensor-parallel rank to the shards there; pure, so any rank can compute it for all.
    """

    shapes: tuple[tuple[int, int], ...]
    in_features: int
    shards: Callable[[int], Sequence[FactorShard]]


class LowRankFactors(LowRankUpdate):
    """The packed factors of one fused linear: `lora_A` [R, K] and `lora_B`, flat.

    `lora_A` is the stack of the factors' A. B is block-diagonal, so `lora_B` stores only its blocks, consecutively and
    transposed ([r, rows of the factor on this rank] each), which is how every operator reads them. Scaling A and
    filling the dense Bᵀ inside autograd would save both results as activations in every layer. The hand-written linears
    call `scaled_a` and `dense_bt` in forward and again in backward instead.
    """

    scale: Tensor
    position: Tensor

    def __init__(
        self,
        shards: Sequence[FactorShard],
        in_features: int,
        out_features: int,
        *,
        sharded_a: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        if not shards:
            raise AssertionError("a linear without factors stays a frozen Megatron linear")
        self.shards = tuple(shards)
        self.out_features = out_features
        self.total_rank = sum(shard.adapter_rank for shard in shards)
        self.lora_A = nn.Parameter(torch.zeros(self.total_rank, in_features, dtype=torch.float32, device=device))
        # DeepSpeed cannot flatten an empty parameter: a rank without a row of B keeps one element that nothing reads.
        self.lora_B = nn.Parameter(torch.zeros(max(1, b_elements(shards)), dtype=torch.float32, device=device))
        for parameter, sharded in ((self.lora_A, sharded_a), (self.lora_B, not sharded_a)):
            mark(parameter, sharded=sharded, partial=not sharded)
        scales = [shard.scale for shard in shards for _ in range(shard.adapter_rank)]
        self.register_buffer("scale", torch.tensor(scales, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("position", self._dense_positions().to(device), persistent=False)
        # One factor over all rows in their own order is already dense; everything else is scattered.
        self.dense = len(shards) == 1 and shards[0].local_rows == tuple(range(out_features))
        self.blocks = () if self.dense else self._blocks()

    def _dense_positions(self) -> Tensor:
        """Return int64 [numel of B]: the flat index of each stored element in the dense Bᵀ [R, O]."""
        positions, first = [], 0
        for shard in self.shards:
            ranks = torch.arange(first, first + shard.adapter_rank)[:, None]
            positions.append((ranks * self.out_features + torch.tensor(shard.local_rows, dtype=torch.int64)).flatten())
            first += shard.adapter_rank
        return torch.cat(positions)

    def _blocks(self) -> tuple[int, ...]:
        """Return (first column, columns, first row, rows) of each non-zero block of Bᵀ, one per run of rows of B."""
        blocks: list[int] = []
        first = 0
        for shard in self.shards:
            rows = sorted(shard.local_rows)
            cuts = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
            for start, stop in zip(cuts, cuts[1:], strict=False):
                if stop > start:
                    blocks += (rows[start], stop - start, first, shard.adapter_rank)
            first += shard.adapter_rank
        # A rank without rows has one block of zero columns, because an empty tuple means dense.
        return tuple(blocks) or (0, 0, 0, 0)

    @property
    def down_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.lora_A,)

    @property
    def up_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.lora_B,)

    def scaled_a(self, dtype: torch.dtype, mask: Mask | None) -> Tensor:
        """Return [R, K]: A with s = alpha / r (or alpha / √r) and 1/(1 − p) folded in."""
        return (self.lora_A.detach() * self._scale(mask)).to(dtype)

    def dense_bt(self, dtype: torch.dtype) -> Tensor:
        """Return [R, O]: block-diagonal B, transposed."""
        stored = self.lora_B.detach().to(dtype)
        if self.dense:
            return stored.view(self.total_rank, self.out_features)
        dense = stored.new_zeros(self.total_rank * self.out_features)
        dense.scatter_(0, self.position, stored)
        return dense.view(self.total_rank, self.out_features)

    def down_gradients(self, unscaled_RK: Tensor, mask: Mask | None) -> tuple[Tensor, ...]:
        """Return dA [R, K] in fp32; dU = dY·B does not carry s/(1 − p), so dUᵀ·(m ⊙ X) is scaled here."""
        return (unscaled_RK.to(self.lora_A.dtype) * self._scale(mask),)

    def up_gradients(self, dense_RO: Tensor) -> tuple[Tensor, ...]:
        """Return dB in packed storage, fp32, from dBᵀ [R, O]. Entries outside the diagonal blocks are ignored."""
        if self.dense:
            return (dense_RO.to(self.lora_B.dtype).reshape(-1),)
        packed = torch.zeros_like(self.lora_B)
        packed[: self.position.numel()] = dense_RO.reshape(-1)[self.position].to(packed.dtype)
        return (packed,)

    def trained(self, factor_map: FactorMap) -> tuple[TrainedParameter, ...]:
        """Return A and B as parts of Θ, stored as `<module path>.lora_A` [r, in] and `.lora_B` [out, r]."""
        names = [shard.name for shard in self.shards]
        whole_a = {
            f"{name}.lora_A": (rank, factor_map.in_features)
            for name, (_, rank) in zip(names, factor_map.shapes, strict=True)
        }
        whole_b = {f"{name}.lora_B": shape for name, shape in zip(names, factor_map.shapes, strict=True)}
        return (
            TrainedParameter(self.lora_A, whole_a, partial(self._shard_of_a, factor_map)),
            TrainedParameter(self.lora_B, whole_b, partial(self._shard_of_b, factor_map)),
        )

    def _shard_of_a(self, factor_map: FactorMap, coordinates: RankCoordinates) -> LocalShard:
        """Return the slices of A at `coordinates`. A is cut by columns where the linear is row-parallel."""
        columns = slice(None)
        if is_sharded(self.lora_A):
            k = self.lora_A.size(1)
            columns = slice(coordinates.dense.tp * k, (coordinates.dense.tp + 1) * k)
        shards = factor_map.shards(coordinates.dense.tp)
        slices = (
            TensorSlice(f"{shard.name}.lora_A", (slice(None), columns), partial(a_of, shards, index))
            for index, shard in enumerate(shards)
        )
        return LocalShard(tuple(self.lora_A.shape), tuple(slices))

    def _shard_of_b(self, factor_map: FactorMap, coordinates: RankCoordinates) -> LocalShard:
        """Return the slices of B at `coordinates`. A rank may hold any subset of B's rows."""
        shards = factor_map.shards(coordinates.dense.tp)
        slices = (
            TensorSlice(f"{shard.name}.lora_B", (list(shard.factor_rows),), partial(b_of, shards, index))
            for index, shard in enumerate(shards)
        )
        return LocalShard((max(1, b_elements(shards)),), tuple(slices))

    def _scale(self, mask: Mask | None) -> Tensor:
        return self.scale[:, None] if mask is None else (self.scale * mask.scale)[:, None]

    def a_of(self, index: int, source: Tensor | None = None) -> Tensor:
        """Return a view of factor `index`'s [r, K] in `lora_A` or a tensor shaped like it (a gradient, a moment)."""
        return a_of(self.shards, index, self.lora_A if source is None else source)

    def b_of(self, index: int, source: Tensor | None = None) -> Tensor:
        """Return a view of factor `index`'s local [rows, r] in `lora_B` or a tensor shaped like it."""
        return b_of(self.shards, index, self.lora_B if source is None else source)


def a_of(shards: Sequence[FactorShard], index: int, stacked_RK: Tensor) -> Tensor:
    """Return a view of factor `index`'s [r, K] in a stack of A. `shards` may be any rank's."""
    start = sum(shard.adapter_rank for shard in shards[:index])
    return stacked_RK[start : start + shards[index].adapter_rank]


def b_of(shards: Sequence[FactorShard], index: int, flat: Tensor) -> Tensor:
    """Return a view of factor `index`'s [rows, r] in the flat blocks of Bᵀ. `shards` may be any rank's."""
    start, shard = b_elements(shards[:index]), shards[index]
    return flat[start : start + b_elements([shard])].view(shard.adapter_rank, len(shard.local_rows)).t()


def b_elements(shards: Sequence[FactorShard]) -> int:
    """Return the number of elements in the blocks of Bᵀ."""
    return sum(len(shard.local_rows) * shard.adapter_rank for shard in shards)
