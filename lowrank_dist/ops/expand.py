"""The way up from R ranks, added to what the frozen product left there, in one pass over it.

    Y += m ⊙ (U · A)        U [T, R], A [R, K], Y [T, K]

dX += m ⊙ (dU·A) is this with the mask of the forward pass, made again.

Legend: T tokens, K columns, R = Σ r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_dist.ops.choice import compiled
from lowrank_dist.ops.extension import extension_loaded
from lowrank_dist.ops.mask import Mask, counters


def expand_ref(out_TK: Tensor, u_TR: Tensor, a_RK: Tensor, mask: Mask | None = None) -> Tensor:
    """Y + m ⊙ (U·A) in plain PyTorch."""
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
    the sum with `out`. `blocks`: quadruples (first column, columns, first rank, ranks) outside of which A is zero;
    empty where it is dense. No autograd.
    """
    if compiled(out_TK):
        torch.ops.lowrank_dist.expand(out_TK, u_TR, a_RK, accumulate, blocks, *counters(mask))
    else:
        out_TK.copy_(expand_ref(out_TK if accumulate else torch.zeros_like(out_TK), u_TR, a_RK, mask))


if extension_loaded():

    @torch.library.register_fake("lowrank_dist::expand")
    def _expand_fake(out: Tensor, u: Tensor, a: Tensor, accumulate: bool, blocks: list[int], *_: object) -> None:
        return None
