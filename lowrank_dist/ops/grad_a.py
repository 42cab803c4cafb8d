"""The gradient of the stacked A, in one read of the input and with the mask of the forward pass.

    dA = dUᵀ · (m ⊙ X)      dU [T, R], X [T, K] → dA [R, K] in fp32

s/(1 − p), which the forward pass folds into A, is applied to the result by the caller.

Legend: T tokens, K features, R = Σ r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_dist.ops.choice import compiled
from lowrank_dist.ops.extension import extension_loaded
from lowrank_dist.ops.mask import Mask, counters


def grad_a_ref(du_TR: Tensor, x_TK: Tensor, mask: Mask | None = None) -> Tensor:
    """dUᵀ·(m ⊙ X) in plain PyTorch, in the dtype of its arguments."""
    return du_TR.t() @ (x_TK if mask is None else mask.select(x_TK))


def grad_a(du_TR: Tensor, x_TK: Tensor, mask: Mask | None = None, blocks: Sequence[int] = ()) -> Tensor:
    """dUᵀ·(m ⊙ X): [T, R], [T, K] → [R, K], fp32 (fp64 for fp64), accumulated in it over all rows.

    Bitwise repeatable whatever the number of threads: the order of the sums follows from the shapes. `blocks`:
    quadruples (first column, columns, first rank, ranks) that are wanted, the rest is undefined; empty for all.
    """
    wide = torch.float64 if x_TK.dtype == torch.float64 else torch.float32
    if not compiled(x_TK):
        return grad_a_ref(du_TR, x_TK, mask).to(wide)
    out_RK = torch.empty(du_TR.size(1), x_TK.size(1), dtype=wide, device=x_TK.device)
    torch.ops.lowrank_dist.grad_a(out_RK, du_TR, x_TK, blocks, *counters(mask))
    return out_RK


if extension_loaded():

    @torch.library.register_fake("lowrank_dist::grad_a")
    def _grad_a_fake(out: Tensor, u: Tensor, x: Tensor, blocks: list[int], *_: object) -> None:
        return None
