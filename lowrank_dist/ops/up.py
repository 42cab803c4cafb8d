"""The products with B: Y += U·Bᵀ, and its two gradients. B is block-diagonal and comes transposed, Bᵀ [R, O].

On a CPU the three operators of A do them, block by block, so that B's zeros are not multiplied. On CUDA they are memory
bound and cuBLAS multiplies the zeros for nothing; dB leaves it in fp32.

Legend: T tokens, O outputs, R = Σ r; blocks: quadruples (first column, columns, first rank, ranks) of Bᵀ's non-zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_dist.ops.down import down
from lowrank_dist.ops.expand import expand
from lowrank_dist.ops.grad_a import grad_a


def up(y_TO: Tensor, u_TR: Tensor, bt_RO: Tensor, blocks: Sequence[int]) -> None:
    """Y += U·Bᵀ in place. Hu et al., "LoRA" (2021), eq. 3."""
    if y_TO.device.type == "cpu":
        expand(y_TO, u_TR, bt_RO, None, blocks)
    else:
        y_TO.addmm_(u_TR, bt_RO)


def up_grad_u(out_TR: Tensor, dy_TO: Tensor, bt_RO: Tensor, blocks: Sequence[int]) -> None:
    """Write dU = dY·B into `out` [T, R], which may be columns of a wider message."""
    if dy_TO.device.type == "cpu":
        down(out_TR, dy_TO, bt_RO, None, blocks)
    else:
        torch.mm(dy_TO, bt_RO.t(), out=out_TR)


def up_grad_b(dy_TO: Tensor, u_TR: Tensor, blocks: Sequence[int]) -> Tensor:
    """dBᵀ = Uᵀ·dY: [R, O] in fp32 (fp64 for fp64); undefined outside the blocks."""
    if dy_TO.device.type == "cpu":
        return grad_a(u_TR, dy_TO, None, blocks)
    if dy_TO.device.type == "cuda" and dy_TO.dtype.itemsize == 2:
        return torch.mm(u_TR.t(), dy_TO, out_dtype=torch.float32)
    return u_TR.t() @ dy_TO
