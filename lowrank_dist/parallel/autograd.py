"""Hand-written autograd of the low-rank linears (DESIGN section 1). No function here adds a collective.

Legend: T tokens, T_j = T / N this rank's token shard, K inputs and O outputs of the rank's weight, R = Σ r.
X̃ = dropout(X) with 1/(1−p) folded in; a = s·A [R, K]; b = block-diagonal B [O, R]; W frozen [O, K].

Which function serves which layer:
  LocalLinear    any layer at N = 1; column- and row-parallel without sequence parallelism
  GatherLinear   column-parallel with sequence parallelism: the AllGather carries [X ∣ U]
  PartialLinear  row-parallel with sequence parallelism, the GEMM half: P = [X·Wᵀ ∣ X̃·aᵀ]
  ReduceExpand   its communication half: the ReduceScatter carries P, then Y = P[:, :O] + P[:, O:]·bᵀ

The row-parallel layer is two functions, and ReduceExpand keeps U_j as a context attribute instead of a saved tensor,
so that under non-reentrant recompute nothing asks for the reduction again (the frozen layer's is skipped too).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lowrank_dist.ops.gemm import linear, linear_into
from lowrank_dist.parallel.collectives import all_reduce, gather_rows, reduce_scatter_rows
from lowrank_dist.parallel.factors import LowRankFactors
from lowrank_dist.parallel.masks import Mask


def _masked(mask: Mask | None, x: Tensor) -> Tensor:
    return x if mask is None else mask.apply(x)


def _expand_accumulate(dx_TK: Tensor, du_TR: Tensor, a_RK: Tensor, mask: Mask | None) -> None:
    """dX += m ⊙ (dU·a), in place."""
    if mask is None:
        dx_TK.addmm_(du_TR, a_RK)
    else:
        dx_TK.add_(mask.apply(du_TR @ a_RK))


class LocalLinear(torch.autograd.Function):
    """Y = X·Wᵀ + bias + X̃·aᵀ·bᵀ on local tensors; with `group`, dX is all-reduced under dA and dB."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        factors: LowRankFactors,
        mask: Mask | None,
        group: ProcessGroup | None,
    ) -> Tensor:
        x_TK = x.flatten(0, -2)
        u_TR = _masked(mask, x_TK) @ factors.down(x.dtype).t()
        y_TO = linear(x_TK, weight, bias)
        y_TO.addmm_(u_TR, factors.up(x.dtype).t())
        ctx.save_for_backward(x, u_TR, weight)
        ctx.factors, ctx.mask, ctx.group = factors, mask, group
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u_TR, weight = ctx.saved_tensors
        factors, mask = ctx.factors, ctx.mask
        dy_TO = dy.flatten(0, -2)
        du_TR = dy_TO @ factors.up(dy.dtype)
        dx, work = None, None
        if ctx.needs_input_grad[0]:
            dx_TK = linear(dy_TO, weight.t())
            _expand_accumulate(dx_TK, du_TR, factors.down(dy.dtype), mask)
            work = all_reduce(dx_TK, ctx.group) if ctx.group is not None else None
            dx = dx_TK.view_as(x)
        da = factors.grad_a(du_TR.t() @ _masked(mask, x.flatten(0, -2)))
        db = factors.grad_b(dy_TO.t() @ u_TR)
        if work is not None:
            work.wait()
        return dx, None, None, da, db, None, None, None


class GatherLinear(torch.autograd.Function):
    """Column-parallel under sequence parallelism: X is this rank's token shard, Y covers all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        factors: LowRankFactors,
        mask: Mask | None,
        group: ProcessGroup,
    ) -> Tensor:
        x_TjK = x.flatten(0, -2)
        k = x_TjK.size(1)
        message = x_TjK.new_empty(x_TjK.size(0), k + factors.total_rank)
        message[:, :k] = x_TjK
        torch.mm(_masked(mask, x_TjK), factors.down(x.dtype).t(), out=message[:, k:])
        gathered, work = gather_rows(message, group)
        work.wait()
        x_TK, u_TR = gathered[:, :k], gathered[:, k:].contiguous()
        y_TO = linear(x_TK, weight, bias)
        y_TO.addmm_(u_TR, factors.up(x.dtype).t())
        # A shard of X and all of U: never the gathered X.
        ctx.save_for_backward(x, u_TR, weight)
        ctx.factors, ctx.mask, ctx.group = factors, mask, group
        return y_TO.view(x.size(0) * group.size(), *x.shape[1:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u_TR, weight = ctx.saved_tensors
        factors, mask = ctx.factors, ctx.mask
        dy_TO = dy.flatten(0, -2)
        # The lowest adapted linear has no dX to ride on: its dU travels alone, R wide.
        k = x.size(-1) if ctx.needs_input_grad[0] else 0
        message = dy_TO.new_empty(dy_TO.size(0), k + factors.total_rank)
        if k:
            linear_into(message[:, :k], dy_TO, weight.t())
        torch.mm(dy_TO, factors.up(dy.dtype), out=message[:, k:])
        reduced, work = reduce_scatter_rows(message, ctx.group)
        db = factors.grad_b(dy_TO.t() @ u_TR)
        work.wait()
        dx_TjK, du_TjR = reduced[:, :k], reduced[:, k:]
        if k:
            _expand_accumulate(dx_TjK, du_TjR, factors.down(dy.dtype), mask)
        da = factors.grad_a(du_TjR.t() @ _masked(mask, x.flatten(0, -2)))
        return (dx_TjK.unflatten(0, x.shape[:-1]) if k else None), None, None, da, db, None, None, None


class PartialLinear(torch.autograd.Function):
    """P = [X·Wᵀ ∣ X̃·aᵀ], a partial sum over ranks: [.., K] → [.., O + R]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, factors: LowRankFactors, mask: Mask | None
    ) -> Tensor:
        x_TK = x.flatten(0, -2)
        out_features = weight.size(0)
        partial = x_TK.new_empty(x_TK.size(0), out_features + factors.total_rank)
        linear_into(partial[:, :out_features], x_TK, weight)
        torch.mm(_masked(mask, x_TK), factors.down(x.dtype).t(), out=partial[:, out_features:])
        ctx.save_for_backward(x, weight)
        ctx.factors, ctx.mask = factors, mask
        return partial.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        factors, mask = ctx.factors, ctx.mask
        dp_T = dp.flatten(0, -2)
        dy_TO, du_TR = dp_T[:, : weight.size(0)], dp_T[:, weight.size(0) :]
        dx = None
        if ctx.needs_input_grad[0]:
            dx_TK = linear(dy_TO, weight.t())
            _expand_accumulate(dx_TK, du_TR, factors.down(dp.dtype), mask)
            dx = dx_TK.view_as(x)
        da = factors.grad_a(du_TR.t() @ _masked(mask, x.flatten(0, -2)))
        return dx, None, da, None, None


class ReduceExpand(torch.autograd.Function):
    """ReduceScatter of P over token shards, then Y_j = P_j[:, :O] + U_j·bᵀ with U_j = P_j[:, O:]."""

    @staticmethod
    def forward(
        ctx: Any, partial: Tensor, lora_b: Tensor, factors: LowRankFactors, group: ProcessGroup, needs_dx: bool
    ) -> Tensor:
        reduced, work = reduce_scatter_rows(partial.flatten(0, -2), group)
        work.wait()
        y_TjO, u_TjR = reduced[:, : factors.out_features], reduced[:, factors.out_features :].contiguous()
        y_TjO.addmm_(u_TjR, factors.up(partial.dtype).t())
        ctx.u_TjR, ctx.factors, ctx.group, ctx.needs_dx = u_TjR, factors, group, needs_dx
        return y_TjO.unflatten(0, (partial.size(0) // group.size(), *partial.shape[1:-1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        factors, group = ctx.factors, ctx.group
        dy_TjO = dy.flatten(0, -2)
        b_OR = factors.up(dy.dtype)
        out = factors.out_features
        message = dy_TjO.new_empty(dy_TjO.size(0), out * ctx.needs_dx + factors.total_rank)
        if ctx.needs_dx:
            message[:, :out] = dy_TjO
        torch.mm(dy_TjO, b_OR, out=message[:, out * ctx.needs_dx :])
        gathered, work = gather_rows(message, group)
        db = factors.grad_b(dy_TjO.t() @ ctx.u_TjR)
        work.wait()
        if not ctx.needs_dx:
            # Below the lowest adapted linear nobody reads dY: only dU was gathered, the rest stays unwritten.
            du_TR = gathered
            gathered = du_TR.new_empty(du_TR.size(0), out + factors.total_rank)
            gathered[:, out:] = du_TR
        return gathered.view(dy.size(0) * group.size(), *dy.shape[1:-1], -1), db, None, None, None
