"""The low-rank update of one fused linear on one rank: the seam between what is trained and what a linear applies.

The linears' autograd asks an update for its operands and gives back gradients with respect to these; how they follow
from parameters, and how parameters are stored, is the update's own affair.

Legend: R = Σ r over the factors of this linear, K inputs and O outputs of this rank's shard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank_dist.ops.mask import Mask


class LowRankUpdate(nn.Module, ABC):
    """Y = X·Wᵀ + U·bᵀ + bias with U = (m ⊙ X)·aᵀ, by operands a [R, K] and bᵀ [R, O].

    out_features: O. total_rank: R. blocks: non-zeros of bᵀ as in ops/low_rank.py, empty where it is dense.
    rescales: the linear hands X·Wᵀ + U·bᵀ to `rescaled`, which adds the bias, in place of adding it itself.
    """

    rescales: ClassVar[bool] = False

    out_features: int
    total_rank: int
    blocks: tuple[int, ...]

    @property
    @abstractmethod
    def down_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that operand a follows from."""

    @property
    @abstractmethod
    def up_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that operand bᵀ follows from."""

    @abstractmethod
    def scaled_a(self, dtype: torch.dtype, mask: Mask | None) -> Tensor:
        """Return a [R, K], which carries the scale s and 1/(1 − p), so that no pass over tokens scales anything."""

    @abstractmethod
    def dense_bt(self, dtype: torch.dtype) -> Tensor:
        """Return bᵀ [R, O]."""

    @abstractmethod
    def down_gradients(self, unscaled_RK: Tensor, mask: Mask | None) -> tuple[Tensor, ...]:
        """Return the gradients of `down_parameters` from dUᵀ·(m ⊙ X), where dU = dY·b."""

    @abstractmethod
    def up_gradients(self, dense_RO: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of `up_parameters` from Uᵀ·dY; what lies outside `blocks` is undefined there."""

    def rescaled(self, z: Tensor, bias: Tensor | None, *, beside_graph: bool) -> Tensor:
        """Return the output [.., O] of `z` = X·Wᵀ + U·bᵀ [.., O], which may be a partial sum over ranks.

        beside_graph: what backward needs is kept where recomputation does not ask for it, since z came out of a
        collective that would be issued again (parallel/autograd.py, ReduceExpand).
        """
        raise AssertionError("an update that rescales nothing is not asked to")
