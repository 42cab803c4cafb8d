"""The low-rank update of one fused linear on one rank: the interface between trained parameters and linears.

The linears' autograd functions ask an update for its operands and return the gradients with respect to these. The
update decides how the operands are computed from parameters and how the parameters are stored.

Legend: R = Σ r over the factors of this linear, K inputs and O outputs of this rank's shard; s scale, p probability and
m mask of dropout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank_dist.ops.mask import Mask


class LowRankUpdate(nn.Module, ABC):
    """Y = X·Wᵀ + U·bᵀ + bias with U = (m ⊙ X)·aᵀ, computed from the operands a [R, K] and bᵀ [R, O].

    out_features: O. total_rank: R. blocks: non-zeros of bᵀ as in ops/low_rank.py, empty where it is dense.
    rescales: the linear passes X·Wᵀ + U·bᵀ to `rescaled`, which adds the bias, instead of adding the bias itself.
    """

    rescales: ClassVar[bool] = False

    out_features: int
    total_rank: int
    blocks: tuple[int, ...]

    @property
    @abstractmethod
    def down_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters from which operand a is computed."""

    @property
    @abstractmethod
    def up_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters from which operand bᵀ is computed."""

    @abstractmethod
    def scaled_a(self, dtype: torch.dtype, mask: Mask | None) -> Tensor:
        """Return a [R, K] with the scale s and 1/(1 − p) included, so that no pass over tokens scales anything."""

    @abstractmethod
    def dense_bt(self, dtype: torch.dtype) -> Tensor:
        """Return bᵀ [R, O]."""

    @abstractmethod
    def down_gradients(self, unscaled_RK: Tensor, mask: Mask | None) -> tuple[Tensor, ...]:
        """Return the gradients of `down_parameters` from dUᵀ·(m ⊙ X), where dU = dY·b."""

    @abstractmethod
    def up_gradients(self, dense_RO: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of `up_parameters` from Uᵀ·dY, whose entries outside `blocks` are undefined."""

    def rescaled(self, z: Tensor, bias: Tensor | None, *, outside_graph: bool) -> Tensor:
        """Return the output [.., O] of `z` = X·Wᵀ + U·bᵀ [.., O], which may be a partial sum over ranks.

        outside_graph: z comes from a collective, so the tensors for backward are kept outside the autograd graph. If z
        were a saved tensor, recomputation would issue the collective again (parallel/autograd.py, ReduceExpand).
        """
        raise AssertionError("only an update with `rescales` is asked to rescale")
