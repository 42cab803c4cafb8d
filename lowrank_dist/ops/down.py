"""The down-projection of all factors that share an input, with dropout, in one read of it.

    U = (m ⊙ X) · Aᵀ        X [T, K], A [R, K] → U [T, R]

A is the stack of the factors (q, k, v; gate, up), with s/(1 − p) folded in. Hu et al., "LoRA" (2021), eq. 3. The mask
is made where it is used and never stored.

Legend: T tokens, K features, R = Σ r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_dist.ops.choice import compiled
from lowrank_dist.ops.extension import extension_loaded
from lowrank_dist.ops.mask import Mask, counters


def down_ref(x_TK: Tensor, a_RK: Tensor, mask: Mask | None = None) -> Tensor:
    """(m ⊙ X)·Aᵀ in plain PyTorch."""
    return (x_TK if mask is None else mask.select(x_TK)) @ a_RK.t()


def down(out_TR: Tensor, x_TK: Tensor, a_RK: Tensor, mask: Mask | None = None, blocks: Sequence[int] = ()) -> None:
    """Write (m ⊙ X)·Aᵀ into `out` [T, R], which may be columns of a wider message (unit inner stride).

    One dtype for all (fp64, fp32, bf16, fp16), any strides of x and a; sums in fp32 (fp64), rounded once. `blocks`:
    quadruples (first column, columns, first rank, ranks) outside of which A is zero; empty where it is dense. No
    autograd.
    """
    if compiled(x_TK):
        torch.ops.lowrank_dist.down(out_TR, x_TK, a_RK, blocks, *counters(mask))
    else:
        out_TR.copy_(down_ref(x_TK, a_RK, mask))


if extension_loaded():

    @torch.library.register_fake("lowrank_dist::down")
    def _down_fake(out: Tensor, x: Tensor, a: Tensor, blocks: list[int], *_: object) -> None:
        return None
