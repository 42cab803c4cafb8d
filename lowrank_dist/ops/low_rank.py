"""The products of the low-rank path, each with its definition in plain PyTorch.

    U = (m ⊙ X) · Aᵀ         `down`       X [T, K], A [R, K] → U [T, R]
    Y += m ⊙ (U · A)         `expand`     dX += m ⊙ (dU·A), with the mask of the forward pass, drawn again
    dA = dUᵀ · (m ⊙ X)       `grad_a`     dU [T, R], X [T, K] → dA [R, K] in fp32
    Y += U · Bᵀ              `up`         and its gradients `up_grad_u` and `up_grad_b`

A is the stack of the factors A that share an input (q, k, v; gate, up), with s/(1 − p) folded in (scale s, dropout
probability p), by which the caller also multiplies dA. Hu et al., "LoRA" (2021), eq. 3. Each operator reads its large
operand once. The mask is drawn where it is used and never stored.

B is block-diagonal and is passed transposed, Bᵀ [R, O]. On a CPU its products run block by block on the three operators
of A, so that B's zeros are not multiplied. On CUDA cuBLAS computes them: they are memory bound, so multiplying the
zeros costs nothing. cuBLAS writes dB in fp32.

Legend: T tokens, K features, O outputs, R = Σ r, m dropout mask. blocks: quadruples (first column, number of columns,
first row, number of rows) of the non-zero blocks of A or Bᵀ; empty where the matrix is dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_dist.ops.extension import compiled, extension_loaded
from lowrank_dist.ops.mask import Mask, counters


def down_ref(x_TK: Tensor, a_RK: Tensor, mask: Mask | None = None) -> Tensor:
    """Return (m ⊙ X)·Aᵀ in plain PyTorch."""
    return (x_TK if mask is None else mask.select(x_TK)) @ a_RK.t()


def down(out_TR: Tensor, x_TK: Tensor, a_RK: Tensor, mask: Mask | None = None, blocks: Sequence[int] = ()) -> None:
    """Write (m ⊙ X)·Aᵀ into `out` [T, R], which may be a slice of the columns of a wider message (unit inner stride).

    All tensors have one dtype (fp64, fp32, bf16, fp16); x and a may have any strides. Sums are in fp32 (fp64 for fp64)
    and rounded once. A is zero outside `blocks`. No autograd.
    """
    if compiled(x_TK):
        torch.ops.lowrank_dist.down(out_TR, x_TK, a_RK, blocks, *counters(mask))
    else:
        out_TR.copy_(down_ref(x_TK, a_RK, mask))


def expand_ref(out_TK: Tensor, u_TR: Tensor, a_RK: Tensor, mask: Mask | None = None) -> Tensor:
    """Return Y + m ⊙ (U·A) in plain PyTorch."""
    return torch.addmm(out_TK, u_TR, a_RK) if mask is None else out_TK + mask.select(u_TR @ a_RK)


def expand(
    out_TK: Tensor,
    u_TR: Tensor,
    a_RK: Tensor,
    mask: Mask | None = None,
    blocks: Sequence[int] = (),
    accumulate: bool = True,
) -> None:
    """Add m ⊙ (U·A) to `out` [T, K], which may be a slice of the columns of a wider message (unit inner stride).

    Without `accumulate`, `out` is overwritten and may be uninitialised.
    All tensors have one dtype (fp64, fp32, bf16, fp16); u and a may have any strides. The product and the sum with
    `out` are in fp32 (fp64 for fp64) and rounded once. A is zero outside `blocks`. No autograd.
    """
    if compiled(out_TK):
        torch.ops.lowrank_dist.expand(out_TK, u_TR, a_RK, accumulate, blocks, *counters(mask))
    else:
        out_TK.copy_(expand_ref(out_TK if accumulate else torch.zeros_like(out_TK), u_TR, a_RK, mask))


def grad_a_ref(du_TR: Tensor, x_TK: Tensor, mask: Mask | None = None) -> Tensor:
    """Return dUᵀ·(m ⊙ X) in plain PyTorch, in the dtype of its arguments."""
    return du_TR.t() @ (x_TK if mask is None else mask.select(x_TK))


def grad_a(du_TR: Tensor, x_TK: Tensor, mask: Mask | None = None, blocks: Sequence[int] = ()) -> Tensor:
    """Return dUᵀ·(m ⊙ X): [T, R], [T, K] → [R, K] in fp32 (fp64 for fp64).

    The compiled operator sums over all rows in that dtype. It is bitwise repeatable for any number of threads: the
    shapes alone fix the order of the sums. Outside `blocks` the result is undefined.
    """
    wide = torch.float64 if x_TK.dtype == torch.float64 else torch.float32
    if not compiled(x_TK):
        return grad_a_ref(du_TR, x_TK, mask).to(wide)
    out_RK = torch.empty(du_TR.size(1), x_TK.size(1), dtype=wide, device=x_TK.device)
    torch.ops.lowrank_dist.grad_a(out_RK, du_TR, x_TK, blocks, *counters(mask))
    return out_RK


def up(y_TO: Tensor, u_TR: Tensor, bt_RO: Tensor, blocks: Sequence[int]) -> None:
    """Add U·Bᵀ to `y` [T, O] in place."""
    if y_TO.device.type == "cpu":
        expand(y_TO, u_TR, bt_RO, None, blocks)
    else:
        y_TO.addmm_(u_TR, bt_RO)


def up_grad_u(out_TR: Tensor, dy_TO: Tensor, bt_RO: Tensor, blocks: Sequence[int]) -> None:
    """Write dU = dY·B into `out` [T, R], which may be a slice of the columns of a wider message."""
    if dy_TO.device.type == "cpu":
        down(out_TR, dy_TO, bt_RO, None, blocks)
    else:
        torch.mm(dy_TO, bt_RO.t(), out=out_TR)


def up_grad_b(dy_TO: Tensor, u_TR: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return dBᵀ = Uᵀ·dY: [R, O] in fp32 (fp64 for fp64); undefined outside the blocks."""
    if dy_TO.device.type == "cpu":
        return grad_a(u_TR, dy_TO, None, blocks)
    if dy_TO.device.type == "cuda" and dy_TO.dtype.itemsize == 2:
        return torch.mm(u_TR.t(), dy_TO, out_dtype=torch.float32)
    return u_TR.t() @ dy_TO


if extension_loaded():

    @torch.library.register_fake("lowrank_dist::down")
    def _down_fake(out: Tensor, x: Tensor, a: Tensor, blocks: list[int], *_: object) -> None:
        return None

    @torch.library.register_fake("lowrank_dist::expand")
    def _expand_fake(out: Tensor, u: Tensor, a: Tensor, accumulate: bool, blocks: list[int], *_: object) -> None:
        return None

    @torch.library.register_fake("lowrank_dist::grad_a")
    def _grad_a_fake(out: Tensor, u: Tensor, x: Tensor, blocks: list[int], *_: object) -> None:
        return None
