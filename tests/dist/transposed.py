"""A second kind of frozen weight, which only defines its two products: W stored as [K, O]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_dist.parallel.frozen import FrozenWeight
from lowrank_dist.parallel.linear import LowRankLinear


class Transposed(FrozenWeight):
    """broken: "grad_x" makes the gradient of the input a little too large."""

    def __init__(self, weight: Tensor, broken: str) -> None:
        self._stored_KO = weight.detach().t().contiguous()
        self._gain = 1.05 if broken == "grad_x" else 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self._stored_KO.size(1), self._stored_KO.size(0)

    @property
    def nbytes(self) -> int:
        return self._stored_KO.nbytes

    def product(self, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
        y_TO = x_TK @ self._stored_KO
        return y_TO if bias is None else y_TO + bias

    def grad_x(self, dy_TO: Tensor) -> Tensor:
        return dy_TO @ self._stored_KO.t() * self._gain

    def rows(self, first: int, last: int) -> Tensor:
        return self._stored_KO[:, first:last].t()


def hold_transposed(model: nn.Module, broken: str) -> None:
    """Let every linear hold its weight transposed. Megatron's own weight, which nothing reads now, becomes NaN."""
    for linear in (module for module in model.modules() if isinstance(module, LowRankLinear)):
        linear.hold(Transposed(linear.weight, broken))
        linear.weight.data.fill_(torch.nan)
