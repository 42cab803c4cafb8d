"""An adapter layer under tensor parallelism, both ways: sharded with collectives of its own, or a copy on every rank.

Legend: H hidden, m bottleneck, N ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lowrank_dist.parallel.collectives import enter_parallel_region, leave_parallel_region
from lowrank_dist.parallel.theta import mark

_NORM_EPS = 1e-5


class Bottleneck(nn.Module):
    """X + W_up·f(W_down·norm(X) + b_down) + b_up on [s, b, H] ([s / N, b, H] under sequence parallelism).

    placement "sharded": W_down is column- and W_up row-parallel, as in Megatron's MLP, which costs a gather and a
    reduce-scatter in forward and in backward (without sequence parallelism an all-reduce each). "replicated": every
    rank stores and computes all of it for the tokens that it has. Parameters are fp32 and cast where they are used.
    """

    def __init__(
        self,
        hidden: int,
        bottleneck: int,
        activation: Callable[[Tensor], Tensor],
        *,
        norm: bool,
        placement: Literal["sharded", "replicated"],
        group: ProcessGroup,
        sequence_parallel: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._activation, self._group, self.sequence_parallel = activation, group, sequence_parallel
        self._sharded = placement == "sharded" and group.size() > 1
        rows = bottleneck // group.size() if self._sharded else bottleneck
        # Copies see a rank's tokens alone where these are cut; else each rank has the whole gradient.
        partial = sequence_parallel and group.size() > 1

        def parameter(*shape: int, sharded: bool = False, fill: float = 0.0) -> nn.Parameter:
            tensor = torch.full(shape, fill, dtype=torch.float32, device=device)
            return mark(nn.Parameter(tensor), sharded=sharded, partial=partial and not sharded)

        self.norm_weight = parameter(hidden, fill=1.0) if norm else None
        self.norm_bias = parameter(hidden) if norm else None
        self.down = parameter(rows, hidden, sharded=self._sharded)
        self.down_bias = parameter(rows, sharded=self._sharded)
        self.up = parameter(hidden, rows, sharded=self._sharded)
        self.up_bias = parameter(hidden)

    def forward(self, x: Tensor) -> Tensor:
        inner = x
        if self.norm_weight is not None:
            weight, bias = self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype)
            inner = F.layer_norm(x, (x.size(-1),), weight, bias, _NORM_EPS)
        if self._sharded:
            inner = enter_parallel_region(inner, self._group, sequence_parallel=self.sequence_parallel)
        inner = self._activation(F.linear(inner, self.down.to(x.dtype), self.down_bias.to(x.dtype)))
        update = F.linear(inner, self.up.to(x.dtype))
        if self._sharded:
            update = leave_parallel_region(update, self._group, sequence_parallel=self.sequence_parallel)
        return x + (update + self.up_bias.to(x.dtype))
