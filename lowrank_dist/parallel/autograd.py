"""Hand-written autograd of the low-rank linears (docs/DESIGN.md, "Mathematics"). No function here adds a collective.

Legend: T tokens, T_j = T / N this rank's token shard, K inputs and O outputs of the rank's weight, R = Σ r.
m the binary dropout mask; a = s/(1−p)·A [R, K]; b = block-diagonal B [O, R], held as bᵀ; W frozen [O, K].
U = (m⊙X)·aᵀ carries all scales, so nothing scales a pass over tokens.

Which function serves which layer:
  LocalLinear    any layer at N = 1; column- and row-parallel without sequence parallelism
  GatherLinear   column-parallel with sequence parallelism: the AllGather carries [X ∣ U]
  PartialLinear  row-parallel with sequence parallelism, the GEMM half: P = [X·Wᵀ ∣ U]
  ReduceExpand   its communication half: the ReduceScatter carries P, then Y = P[:, :O] + P[:, O:]·bᵀ

The row-parallel layer is two functions, and ReduceExpand keeps U_j as a context attribute instead of a saved tensor,
so that under non-reentrant recompute nothing asks for the reduction again (the frozen layer's is skipped too).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lowrank_dist.ops.linear import adapted, adapted_grad_x, linear, linear_into
from lowrank_dist.ops.low_rank import down, expand, grad_a, up, up_grad_b, up_grad_u
from lowrank_dist.ops.mask import Mask
from lowrank_dist.parallel.collectives import all_reduce, gather_rows, reduce_scatter_rows
from lowrank_dist.parallel.factors import Lanes, LowRankFactors


def _grad_a(factors: LowRankFactors, du_TR: Tensor, x: Tensor, mask: Mask | None) -> Tensor:
    return factors.grad_a(grad_a(du_TR, x.flatten(0, -2), mask), mask)


def _grad_b(factors: LowRankFactors, dy_TO: Tensor, u_TR: Tensor) -> Tensor:
    return factors.grad_b(up_grad_b(dy_TO, u_TR, factors.blocks))


class LocalLinear(torch.autograd.Function):
    """Y = X·Wᵀ + bias + U·bᵀ on local tensors; with `group`, dX is all-reduced under dA and dB."""

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
        u_TR = x_TK.new_empty(x_TK.size(0), factors.total_rank)
        down(u_TR, x_TK, factors.scaled_a(x.dtype, mask), mask)
        y_TO = adapted(x_TK, weight, bias, u_TR, factors.dense_bt(x.dtype), factors.blocks)
        ctx.save_for_backward(x, u_TR, weight)
        ctx.factors, ctx.mask, ctx.group = factors, mask, group
        return y_TO.view(*x.shape[:-1], y_TO.size(1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u_TR, weight = ctx.saved_tensors
        factors, mask = ctx.factors, ctx.mask
        needs_dx, needs_da, needs_db = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        dy_TO = dy.flatten(0, -2)
        dx, da, db, work = None, None, None, None
        if needs_dx or needs_da:
            du_TR = dy_TO.new_empty(dy_TO.size(0), factors.total_rank)
            up_grad_u(du_TR, dy_TO, factors.dense_bt(dy.dtype), factors.blocks)
        if needs_dx:
            dx_TK = adapted_grad_x(dy_TO, weight, du_TR, factors.scaled_a(dy.dtype, mask), mask)
            work = all_reduce(dx_TK, ctx.group) if ctx.group is not None else None
            dx = dx_TK.view_as(x)
        if needs_da:
            da = _grad_a(factors, du_TR, x, mask)
        if needs_db:
            db = _grad_b(factors, dy_TO, u_TR)
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
        lanes: Lanes | None,
    ) -> Tensor:
        x_TjK = x.flatten(0, -2)
        k = x_TjK.size(1)
        message = x_TjK.new_empty(x_TjK.size(0), k + factors.total_rank)
        message[:, :k] = x_TjK
        down(message[:, k:], x_TjK, factors.scaled_a(x.dtype, mask), mask)
        gathered, work = gather_rows(message, group)
        work.wait()
        u_TR, bt_RO = gathered[:, k:].contiguous(), factors.dense_bt(x.dtype)
        if lanes is None:
            y_TO = adapted(gathered[:, :k], weight, bias, u_TR, bt_RO, factors.blocks)
        else:
            y_TO = linear(gathered, lanes.with_factor(bt_RO.t()), bias)
        # A shard of X and all of U: never the gathered X.
        ctx.save_for_backward(x, u_TR, weight)
        ctx.factors, ctx.mask, ctx.group, ctx.lanes = factors, mask, group, lanes
        return y_TO.view(x.size(0) * group.size(), *x.shape[1:-1], y_TO.size(1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u_TR, weight = ctx.saved_tensors
        factors, mask = ctx.factors, ctx.mask
        dy_TO = dy.flatten(0, -2)
        # The lowest adapted linear has no dX to ride on: its dU travels alone, R wide.
        k, bt_RO = x.size(-1) if ctx.needs_input_grad[0] else 0, factors.dense_bt(dy.dtype)
        if k and ctx.lanes is not None:
            message = linear(dy_TO, ctx.lanes.with_factor(bt_RO.t()).t())
        else:
            message = dy_TO.new_empty(dy_TO.size(0), k + factors.total_rank)
            if k:
                linear_into(message[:, :k], dy_TO, weight.t())
            up_grad_u(message[:, k:], dy_TO, bt_RO, factors.blocks)
        reduced, work = reduce_scatter_rows(message, ctx.group)
        db = _grad_b(factors, dy_TO, u_TR) if ctx.needs_input_grad[4] else None
        work.wait()
        dx_TjK, du_TjR = reduced[:, :k], reduced[:, k:]
        if k:
            expand(dx_TjK, du_TjR, factors.scaled_a(dy.dtype, mask), mask)
        da = _grad_a(factors, du_TjR, x, mask) if ctx.needs_input_grad[3] else None
        return (dx_TjK.unflatten(0, x.shape[:-1]) if k else None), None, None, da, db, None, None, None, None


class PartialLinear(torch.autograd.Function):
    """P = [X·Wᵀ ∣ (m⊙X)·aᵀ], a partial sum over ranks: [.., K] → [.., O + R]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        factors: LowRankFactors,
        mask: Mask | None,
        lanes: Lanes | None,
    ) -> Tensor:
        x_TK, a_RK = x.flatten(0, -2), factors.scaled_a(x.dtype, mask)
        out_features = weight.size(0)
        if lanes is not None and mask is None:
            partial = linear(x_TK, lanes.with_factor(a_RK))
        else:
            partial = x_TK.new_empty(x_TK.size(0), out_features + factors.total_rank)
            linear_into(partial[:, :out_features], x_TK, weight)
            down(partial[:, out_features:], x_TK, a_RK, mask)
        ctx.save_for_backward(x, weight)
        ctx.factors, ctx.mask, ctx.lanes = factors, mask, lanes
        return partial.view(*x.shape[:-1], partial.size(1))

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        factors, mask = ctx.factors, ctx.mask
        dp_T = dp.flatten(0, -2)
        dy_TO, du_TR = dp_T[:, : weight.size(0)], dp_T[:, weight.size(0) :]
        dx = None
        if ctx.needs_input_grad[0]:
            a_RK = factors.scaled_a(dp.dtype, mask)
            if ctx.lanes is not None and mask is None:
                dx_TK = linear(dp_T, ctx.lanes.with_factor(a_RK).t())
            else:
                dx_TK = adapted_grad_x(dy_TO, weight, du_TR, a_RK, mask)
            dx = dx_TK.view_as(x)
        da = _grad_a(factors, du_TR, x, mask) if ctx.needs_input_grad[2] else None
        return dx, None, da, None, None, None


class ReduceExpand(torch.autograd.Function):
    """ReduceScatter of P over token shards, then Y_j = P_j[:, :O] + U_j·bᵀ with U_j = P_j[:, O:]."""

    @staticmethod
    def forward(
        ctx: Any, partial: Tensor, lora_b: Tensor, factors: LowRankFactors, group: ProcessGroup, needs_dx: bool
    ) -> Tensor:
        reduced, work = reduce_scatter_rows(partial.flatten(0, -2), group)
        work.wait()
        y_TjO, u_TjR = reduced[:, : factors.out_features], reduced[:, factors.out_features :].contiguous()
        up(y_TjO, u_TjR, factors.dense_bt(partial.dtype), factors.blocks)
        ctx.u_TjR, ctx.factors, ctx.group, ctx.needs_dx = u_TjR, factors, group, needs_dx
        return y_TjO.unflatten(0, (partial.size(0) // group.size(), *partial.shape[1:-1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        factors, group = ctx.factors, ctx.group
        dy_TjO = dy.flatten(0, -2)
        out = factors.out_features
        message = dy_TjO.new_empty(dy_TjO.size(0), out * ctx.needs_dx + factors.total_rank)
        if ctx.needs_dx:
            message[:, :out] = dy_TjO
        up_grad_u(message[:, out * ctx.needs_dx :], dy_TjO, factors.dense_bt(dy.dtype), factors.blocks)
        gathered, work = gather_rows(message, group)
        db = _grad_b(factors, dy_TjO, ctx.u_TjR) if ctx.needs_input_grad[1] else None
        work.wait()
        if not ctx.needs_dx:
            # Below the lowest adapted linear nobody reads dY: only dU was gathered, the rest stays unwritten.
            du_TR = gathered
            gathered = du_TR.new_empty(du_TR.size(0), out + factors.total_rank)
            gathered[:, out:] = du_TR
        return gathered.view(dy.size(0) * group.size(), *dy.shape[1:-1], gathered.size(1)), db, None, None, None
