"""The frozen weight of one parallel linear: the interface between its storage and the autograd functions.

A subclass implements the two products with W. The base class builds the joint products with a low-rank update from
them; a subclass overrides a joint product where it can compute both terms in one pass. Under sequence parallelism the
operands lie side by side in the messages, and `FusedBuffer` computes both terms in one GEMM:

    column-parallel   buffer [O, K + R] = [W ∣ b]     Y = [X ∣ U]·bufferᵀ      [dX ∣ dU] = dY·buffer
    row-parallel      buffer [O + R, K] = [W ; a]     P = [X·Wᵀ ∣ U] = X·bufferᵀ      dX = [dY ∣ dU]·buffer

The row-parallel identities hold only without dropout (m ⊙ X = X); with a mask the two products are computed apart.

Legend: T tokens, K inputs and O outputs of this rank's weight, R = Σ r of the update; s scale, p probability and m mask
of dropout; a = s/(1−p)·A [R, K], bᵀ [R, O] the block-diagonal B transposed, `blocks` its non-zeros as in
ops/low_rank.py; U = (m ⊙ X)·aᵀ; P this rank's partial sums. Nothing here is differentiable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_dist.ops.linear import adapted, adapted_grad_x, linear, linear_into
from lowrank_dist.ops.low_rank import down, expand, up, up_grad_u
from lowrank_dist.ops.mask import Mask

# Device types on which fused factors were measured to be faster (docs/LOG.md). On a CPU the fused product takes 0.93 to
# 0.99 of the time of the two separate ones. On an H200 a layer took 0.985 of the time in one setting, but no comparison
# run has trained with fused factors there.
FASTER_ON = ("cpu",)


class FrozenWeight(ABC):
    """W [O, K] of one linear on this rank, in whatever form it is held."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(O, K)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the weight takes on the rank, as it is stored."""

    @abstractmethod
    def product(self, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return X·Wᵀ + bias [T, O], contiguous."""

    @abstractmethod
    def grad_x(self, dy_TO: Tensor) -> Tensor:
        """Return dY·W [T, K], contiguous."""

    @abstractmethod
    def rows(self, first: int, last: int) -> Tensor:
        """Return W[first:last] as the products use it, in a floating dtype."""

    def product_into(self, out_TO: Tensor, x_TK: Tensor) -> None:
        """Write X·Wᵀ into `out`, which may be columns of a wider message."""
        out_TO.copy_(self.product(x_TK))

    def grad_x_into(self, out_TK: Tensor, dy_TO: Tensor) -> None:
        """Write dY·W into `out`, which may be columns of a wider message."""
        out_TK.copy_(self.grad_x(dy_TO))

    def adapted(self, x_TK: Tensor, bias: Tensor | None, u_TR: Tensor, bt_RO: Tensor, blocks: Sequence[int]) -> Tensor:
        """Return X·Wᵀ + bias + U·bᵀ [T, O]."""
        y_TO = self.product(x_TK, bias)
        up(y_TO, u_TR, bt_RO, blocks)
        return y_TO

    def adapted_grad_x(self, dy_TO: Tensor, du_TR: Tensor, a_RK: Tensor, mask: Mask | None) -> Tensor:
        """Return dY·W + m ⊙ (dU·a) [T, K]."""
        dx_TK = self.grad_x(dy_TO)
        expand(dx_TK, du_TR, a_RK, mask)
        return dx_TK

    def adapted_of_message(
        self, message: Tensor, bias: Tensor | None, u_TR: Tensor, bt_RO: Tensor, blocks: Sequence[int]
    ) -> Tensor:
        """Return X·Wᵀ + bias + U·bᵀ [T, O] from a message [X ∣ U]; `u_TR` is a contiguous copy of its U."""
        return self.adapted(message[:, : self.shape[1]], bias, u_TR, bt_RO, blocks)

    def grad_message(self, dy_TO: Tensor, bt_RO: Tensor, blocks: Sequence[int]) -> Tensor:
        """Return the message [dY·W ∣ dY·b] [T, K + R]."""
        k = self.shape[1]
        message = dy_TO.new_empty(dy_TO.size(0), k + bt_RO.size(0))
        self.grad_x_into(message[:, :k], dy_TO)
        up_grad_u(message[:, k:], dy_TO, bt_RO, blocks)
        return message

    def partial_message(self, x_TK: Tensor, a_RK: Tensor, mask: Mask | None) -> Tensor:
        """Return the message [X·Wᵀ ∣ (m ⊙ X)·aᵀ] [T, O + R]."""
        o = self.shape[0]
        message = x_TK.new_empty(x_TK.size(0), o + a_RK.size(0))
        self.product_into(message[:, :o], x_TK)
        down(message[:, o:], x_TK, a_RK, mask)
        return message

    def grad_x_of_message(self, message: Tensor, a_RK: Tensor, mask: Mask | None) -> Tensor:
        """Return dY·W + m ⊙ (dU·a) [T, K] from a message [dY ∣ dU]."""
        o = self.shape[0]
        return self.adapted_grad_x(message[:, :o], message[:, o:], a_RK, mask)


class Dense(FrozenWeight):
    """W as a plain tensor of the model's dtype: Megatron's own parameter."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.size(0), self.weight.size(1)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def product(self, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x_TK, self.weight, bias)

    def grad_x(self, dy_TO: Tensor) -> Tensor:
        return linear(dy_TO, self.weight.t())

    def rows(self, first: int, last: int) -> Tensor:
        return self.weight.detach()[first:last]

    def product_into(self, out_TO: Tensor, x_TK: Tensor) -> None:
        linear_into(out_TO, x_TK, self.weight)

    def grad_x_into(self, out_TK: Tensor, dy_TO: Tensor) -> None:
        linear_into(out_TK, dy_TO, self.weight.t())

    # On CUDA the low-rank term is written first and the large GEMM adds to it (ops/linear.py).

    def adapted(self, x_TK: Tensor, bias: Tensor | None, u_TR: Tensor, bt_RO: Tensor, blocks: Sequence[int]) -> Tensor:
        return adapted(x_TK, self.weight, bias, u_TR, bt_RO, blocks)

    def adapted_grad_x(self, dy_TO: Tensor, du_TR: Tensor, a_RK: Tensor, mask: Mask | None) -> Tensor:
        return adapted_grad_x(dy_TO, self.weight, du_TR, a_RK, mask)


class FusedBuffer(Dense):
    """W and the factor beside it in one buffer, for the messages of sequence parallelism.

    The weight's storage moves into the buffer, so W exists once. The factor is copied in before each use.
    """

    def __init__(self, weight: nn.Parameter, total_rank: int, kind: Literal["column", "row"]) -> None:
        super().__init__(weight)
        o, k = self.shape
        self._column = kind == "column"
        size = (o, k + total_rank) if self._column else (o + total_rank, k)
        self._buffer = weight.new_empty(size, requires_grad=False)
        inside = self._buffer[:o, :k]
        self._factor = self._buffer[:, k:] if self._column else self._buffer[o:]
        inside.copy_(weight.detach())
        weight.data = inside

    def with_factor(self, factor: Tensor) -> Tensor:
        """Copy the present factor, b [O, R] or a [R, K], into its part of the buffer and return the buffer."""
        self._factor.copy_(factor)
        return self._buffer

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def adapted_of_message(
        self, message: Tensor, bias: Tensor | None, u_TR: Tensor, bt_RO: Tensor, blocks: Sequence[int]
    ) -> Tensor:
        return linear(message, self.with_factor(bt_RO.t()), bias)

    def grad_message(self, dy_TO: Tensor, bt_RO: Tensor, blocks: Sequence[int]) -> Tensor:
        return linear(dy_TO, self.with_factor(bt_RO.t()).t())

    def partial_message(self, x_TK: Tensor, a_RK: Tensor, mask: Mask | None) -> Tensor:
        if mask is not None:
            return super().partial_message(x_TK, a_RK, mask)
        return linear(x_TK, self.with_factor(a_RK))

    def grad_x_of_message(self, message: Tensor, a_RK: Tensor, mask: Mask | None) -> Tensor:
        if mask is not None:
            return super().grad_x_of_message(message, a_RK, mask)
        return linear(message, self.with_factor(a_RK).t())


def fuses_factors(setting: Literal["auto", "on", "off"], device: str) -> bool:
    """Return whether a run fuses its factors on this kind of device. setting: engine.lanes."""
    return setting == "on" or (setting == "auto" and device in FASTER_ON)


class FrozenLinear(torch.autograd.Function):
    """Y = X·Wᵀ + bias for a weight without an update: [.., K] → [.., O]. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        assert bias is None or not bias.requires_grad, "the bias of a frozen linear is frozen"
        ctx.weight = weight
        return weight.product(x.flatten(0, -2), bias).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.weight.grad_x(dy.flatten(0, -2)).unflatten(0, dy.shape[:-1]), None, None
