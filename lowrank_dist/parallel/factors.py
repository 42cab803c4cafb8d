"""Θ of one fused linear on one rank: packed storage of A and B, and the forms in which they are used.

Legend: R = Σ r over the factors of this linear, K inputs and O outputs of this rank's shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FactorShard:
    """One factor's share of this rank: its rank r, its scale, and which rows of B lie here.

    `local_rows[i]` is the output row of this rank's fused weight, `factor_rows[i]` the row of the factor's own full
    [out, r] matrix B. Both are empty where this rank holds no row of the factor (fewer KV heads than ranks).
    """

    name: str
    rank: int
    scale: float
    local_rows: tuple[int, ...]
    factor_rows: tuple[int, ...]


class LowRankFactors(nn.Module):
    """The packed factors of one fused linear: `lora_A` [R, K] and `lora_B`, flat.

    A is the stack of the factors' A; B is block-diagonal, so only its blocks are stored, one after the other
    ([rows of the factor on this rank, r] each). Stacking and filling inside autograd would save both as
    activations in every layer; the hand-written linears call `down` and `up` instead, in forward and again in backward.

    Attributes set on the parameters, all read by the engine:
      tensor_model_parallel  sharded over tensor parallelism (DeepSpeed's and Megatron's name for it);
      tp_partial_grad        replicated, with a gradient that is a partial sum (the deferred reduction).
    """

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
        self.total_rank = sum(shard.rank for shard in shards)
        blocks = [len(shard.local_rows) * shard.rank for shard in shards]
        self.lora_A = nn.Parameter(torch.zeros(self.total_rank, in_features, dtype=torch.float32, device=device))
        # DeepSpeed cannot flatten an empty parameter: a rank without a row of B keeps one element that nothing reads.
        self.lora_B = nn.Parameter(torch.zeros(max(1, sum(blocks)), dtype=torch.float32, device=device))
        for parameter, sharded in ((self.lora_A, sharded_a), (self.lora_B, not sharded_a)):
            parameter.tensor_model_parallel = sharded
            parameter.tp_partial_grad = not sharded
        scales = [shard.scale for shard in shards for _ in range(shard.rank)]
        self.register_buffer("scale", torch.tensor(scales, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("position", self._dense_positions().to(device), persistent=False)
        # One factor over all rows in their own order is already dense; everything else is scattered.
        self.dense = len(shards) == 1 and shards[0].local_rows == tuple(range(out_features))

    def _dense_positions(self) -> Tensor:
        """int64 [numel of B]: where each stored element lies in the dense [O, R]."""
        positions, column = [], 0
        for shard in self.shards:
            rows = torch.tensor(shard.local_rows, dtype=torch.int64)[:, None]
            columns = torch.arange(column, column + shard.rank)
            positions.append((rows * self.total_rank + columns).flatten())
            column += shard.rank
        return torch.cat(positions)

    def down(self, dtype: torch.dtype) -> Tensor:
        """[R, K]: A with s = alpha / r (or alpha / √r) folded in, so that no pass over tokens scales anything."""
        return (self.lora_A.detach() * self.scale[:, None]).to(dtype)

    def up(self, dtype: torch.dtype) -> Tensor:
        """[O, R]: block-diagonal B."""
        stored = self.lora_B.detach().to(dtype)
        if self.dense:
            return stored.view(self.out_features, self.total_rank)
        dense = stored.new_zeros(self.out_features * self.total_rank)
        dense[self.position] = stored[: self.position.numel()]
        return dense.view(self.out_features, self.total_rank)

    def grad_a(self, unscaled_RK: Tensor) -> Tensor:
        """dA [R, K] in fp32, from dUᵀ·X̃ where dU = dY·B does not carry s."""
        return unscaled_RK.to(self.lora_A.dtype) * self.scale[:, None]

    def grad_b(self, dense_OR: Tensor) -> Tensor:
        """dB in packed storage, fp32, from the dense [O, R]."""
        if self.dense:
            return dense_OR.to(self.lora_B.dtype).reshape(-1)
        packed = torch.zeros_like(self.lora_B)
        packed[: self.position.numel()] = dense_OR.reshape(-1)[self.position].to(packed.dtype)
        return packed

    def a_of(self, index: int, source: Tensor | None = None) -> Tensor:
        """View of factor `index`'s [r, K] in `lora_A` or in a tensor shaped like it (a gradient, a moment)."""
        start = sum(shard.rank for shard in self.shards[:index])
        return (self.lora_A if source is None else source)[start : start + self.shards[index].rank]

    def b_of(self, index: int, source: Tensor | None = None) -> Tensor:
        """View of factor `index`'s local [rows, r] in `lora_B` or in a tensor shaped like it."""
        start = sum(len(shard.local_rows) * shard.rank for shard in self.shards[:index])
        shard = self.shards[index]
        flat = self.lora_B if source is None else source
        return flat[start : start + len(shard.local_rows) * shard.rank].view(len(shard.local_rows), shard.rank)
