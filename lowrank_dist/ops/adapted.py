"""The frozen product and the low-rank one into one output, forward and backward.

    Y = X·Wᵀ + bias + U·Bᵀ        dX = dY·W + m ⊙ (dU·A)

On CUDA the thin product is written first and the frozen one adds to it (beta = 1): the large GEMM is bound by its
arithmetic, so what its epilogue reads costs little, while a thin product that comes second would read and write the
output in a pass of its own. The thin term is then rounded before the sum, where the frozen one would be. On a CPU
oneDNN's fp32 product has no beta, and the thin one comes second.

Legend: T tokens, K inputs, O outputs, R = Σ r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_dist.ops.expand import expand
from lowrank_dist.ops.gemm import linear
from lowrank_dist.ops.mask import Mask
from lowrank_dist.ops.up import up


def adapted(
    x_TK: Tensor, weight_OK: Tensor, bias: Tensor | None, u_TR: Tensor, bt_RO: Tensor, blocks: Sequence[int]
) -> Tensor:
    """X·Wᵀ + bias + U·Bᵀ: [T, O], contiguous. `blocks` as in ops/up.py. No autograd."""
    if x_TK.device.type == "cuda":
        y_TO = u_TR @ bt_RO if bias is None else torch.addmm(bias, u_TR, bt_RO)
        return y_TO.addmm_(x_TK, weight_OK.t())
    y_TO = linear(x_TK, weight_OK, bias)
    up(y_TO, u_TR, bt_RO, blocks)
    return y_TO


def adapted_grad_x(dy_TO: Tensor, weight_OK: Tensor, du_TR: Tensor, a_RK: Tensor, mask: Mask | None) -> Tensor:
    """dY·W + m ⊙ (dU·A): [T, K], contiguous. No autograd."""
    if dy_TO.device.type == "cuda":
        dx_TK = dy_TO.new_empty(dy_TO.size(0), weight_OK.size(1))
        expand(dx_TK, du_TR, a_RK, mask, accumulate=False)
        return dx_TK.addmm_(dy_TO, weight_OK)
    dx_TK = linear(dy_TO, weight_OK.t())
    expand(dx_TK, du_TR, a_RK, mask)
    return dx_TK
