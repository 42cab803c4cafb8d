"""The products of the low-rank path, each with the plain PyTorch that defines it.

    U = (m ⊙ X) · Aᵀ         `down`       X [T, K], A [R, K] → U [T, R]
    Y += m ⊙ (U · A)         `expand`     dX += m ⊙ (dU·A), with the mask of the forward pass, made again
    dA = dUᵀ · (m ⊙ X)       `grad_a`     dU [T, R], X [T, K] → dA [R, K] in fp32
    Y += U · Bᵀ              `up`         and its gradients `up_grad_u` and `up_grad_b`

A is the stack of the factors that share an input (q, k, v; gate, up), with s/(1 − p) folded in; the caller applies it
to dA. Hu et al., "LoRA" (2021), eq. 3. Each reads its large operand once. The mask is made where it is used and
never stored.

B is block-diagonal and comes transposed, Bᵀ [R, O]. On a CPU the three operators of A do its products, block by block,
so that B's zeros are not multiplied. On CUDA they are memory bound and cuBLAS multiplies the zeros for nothing; dB
leaves it in fp32.

Legend: T tokens, K features, O outputs, R = Σ r; blocks: quadruples (first column, columns, first rank, ranks) of the
non-zeros of A or Bᵀ, empty where it is dense.
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
    """Write (m ⊙ X)·Aᵀ into `out` [T, R], which may be columns of a wider message (unit inner stride).

    One dtype for all (fp64, fp32, bf16, fp16), any strides of x and a; sums in fp32 (fp64), rounded once. A is zero
    outside `blocks`. No autograd.
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
    """Add m ⊙ (U·A) to `out` [T, K] in place; `out` may be columns of a wider message (unit inner stride).

    Without `accumulate`, `out` is written and not read: it may be uninitialised.
    One dtype for all (fp64, fp32, bf16, fp16), any strides of u and a; the product in fp32 (fp64), one rounding after
    the sum with `out`. A is zero outside `blocks`. No autograd.
    """
    if compiled(out_TK):
        torch.ops.lowrank_dist.expand(out_TK, u_TR, a_RK, accumulate, blocks, *counters(mask))
    else:
        out_TK.copy_(expand_ref(out_TK if accumulate else torch.zeros_like(out_TK), u_TR, a_RK, mask))


def grad_a_ref(du_TR: Tensor, x_TK: Tensor, mask: Mask | None = None) -> Tensor:
    """Return dUᵀ·(m ⊙ X) in plain PyTorch, in the dtype of its arguments."""
    return du_TR.t() @ (x_TK if mask is None else mask.select(x_TK))


def grad_a(du_TR: Tensor, x_TK: Tensor, mask: Mask | None = None, blocks: Sequence[int] = ()) -> Tensor:
    """Return dUᵀ·(m ⊙ X): [T, R], [T, K] → [R, K], fp32 (fp64 for fp64), accumulated in it over all rows.

    Bitwise repeatable whatever the number of threads: the order of the sums follows from the shapes. Outside
    `blocks` the result is undefined.
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
    """Write dU = dY·B into `out` [T, R], which may be columns of a wider message."""
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
