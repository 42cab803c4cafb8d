"""Hand-written autograd of the low-rank linears (docs/DESIGN.md, "Mathematics"). No function here adds a collective.

Legend: N tensor-parallel ranks, T tokens, T_j = T / N this rank's token shard, K inputs and O outputs of the rank's
weight, R = Σ r; s scale, p probability and m binary mask of dropout; a = s/(1−p)·A [R, K]; b = block-diagonal B [O, R],
stored as bᵀ; W frozen [O, K]. U = (m⊙X)·aᵀ has the scales of a, so that no pass over tokens is needed for scaling.

FrozenWeight (parallel/frozen.py) decides how W is stored, LowRankUpdate (parallel/update.py) how a and b are computed
from parameters. Each function takes the parameters that it returns gradients for as its last arguments.

The functions and the layers that use them:
  LocalLinear    any layer at N = 1; column- and row-parallel without sequence parallelism
  GatherLinear   column-parallel with sequence parallelism: the AllGather carries [X ∣ U]
  PartialLinear  row-parallel with sequence parallelism, the GEMM half: P = [X·Wᵀ ∣ U]
  ReduceExpand   the communication half of the same layer: ReduceScatter of P, then Y = P[:, :O] + P[:, O:]·bᵀ

The row-parallel layer is two functions, and ReduceExpand keeps U_j as a context attribute instead of a saved tensor.
Non-reentrant recomputation ends at the last saved tensor, so it does not issue a layer's last reduction again. The same
holds for a frozen layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lowrank_dist.ops.low_rank import down, expand, grad_a, up, up_grad_b, up_grad_u
from lowrank_dist.ops.mask import Mask
from lowrank_dist.parallel.collectives import all_reduce, gather_rows, reduce_scatter_rows
from lowrank_dist.parallel.frozen import FrozenWeight
from lowrank_dist.parallel.update import LowRankUpdate

Gradients = tuple[Tensor | None, ...]


def _down_gradients(needed: bool, update: LowRankUpdate, du_TR: Tensor, x: Tensor, mask: Mask | None) -> Gradients:
    if not needed:
        return (None,) * len(update.down_parameters)
    return update.down_gradients(grad_a(du_TR, x.flatten(0, -2), mask), mask)


def _up_gradients(needed: bool, update: LowRankUpdate, dy_TO: Tensor, u_TR: Tensor) -> Gradients:
    if not needed:
        return (None,) * len(update.up_parameters)
    return update.up_gradients(up_grad_b(dy_TO, u_TR, update.blocks))


def _needed(ctx: Any, first: int, update: LowRankUpdate) -> tuple[bool, bool]:
    """Return whether any down parameter, and whether any up parameter, needs a gradient.

    The arguments from `first` on are the down parameters, then the up parameters.
    """
    split = first + len(update.down_parameters)
    return any(ctx.needs_input_grad[first:split]), any(ctx.needs_input_grad[split:])


class LocalLinear(torch.autograd.Function):
    """Y = X·Wᵀ + bias + U·bᵀ on local tensors.

    With `group`, dX is all-reduced over it while dA and dB are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        update: LowRankUpdate,
        mask: Mask | None,
        group: ProcessGroup | None,
        *parameters: Tensor,
    ) -> Tensor:
        x_TK = x.flatten(0, -2)
        u_TR = x_TK.new_empty(x_TK.size(0), update.total_rank)
        down(u_TR, x_TK, update.scaled_a(x.dtype, mask), mask)
        y_TO = weight.adapted(x_TK, bias, u_TR, update.dense_bt(x.dtype), update.blocks)
        ctx.save_for_backward(x, u_TR)
        ctx.weight, ctx.update, ctx.mask, ctx.group = weight, update, mask, group
        return y_TO.view(*x.shape[:-1], y_TO.size(1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, u_TR = ctx.saved_tensors
        update, mask = ctx.update, ctx.mask
        needs_dx, (needs_down, needs_up) = ctx.needs_input_grad[0], _needed(ctx, 6, update)
        dy_TO = dy.flatten(0, -2)
        dx, du_TR, work = None, dy_TO.new_empty(dy_TO.size(0), update.total_rank), None
        if needs_dx or needs_down:
            up_grad_u(du_TR, dy_TO, update.dense_bt(dy.dtype), update.blocks)
        if needs_dx:
            dx_TK = ctx.weight.adapted_grad_x(dy_TO, du_TR, update.scaled_a(dy.dtype, mask), mask)
            work = all_reduce(dx_TK, ctx.group) if ctx.group is not None else None
            dx = dx_TK.view_as(x)
        downs = _down_gradients(needs_down, update, du_TR, x, mask)
        ups = _up_gradients(needs_up, update, dy_TO, u_TR)
        if work is not None:
            work.wait()
        return dx, None, None, None, None, None, *downs, *ups


class GatherLinear(torch.autograd.Function):
    """Column-parallel under sequence parallelism: X is this rank's token shard, Y covers all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        update: LowRankUpdate,
        mask: Mask | None,
        group: ProcessGroup,
        *parameters: Tensor,
    ) -> Tensor:
        x_TjK = x.flatten(0, -2)
        k = x_TjK.size(1)
        message = x_TjK.new_empty(x_TjK.size(0), k + update.total_rank)
        message[:, :k] = x_TjK
        down(message[:, k:], x_TjK, update.scaled_a(x.dtype, mask), mask)
        gathered, work = gather_rows(message, group)
        work.wait()
        u_TR = gathered[:, k:].contiguous()
        y_TO = weight.adapted_of_message(gathered, bias, u_TR, update.dense_bt(x.dtype), update.blocks)
        # Saves this rank's shard of X and the whole U, not the gathered X.
        ctx.save_for_backward(x, u_TR)
        ctx.weight, ctx.update, ctx.mask, ctx.group = weight, update, mask, group
        return y_TO.view(x.size(0) * group.size(), *x.shape[1:-1], y_TO.size(1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, u_TR = ctx.saved_tensors
        update, mask = ctx.update, ctx.mask
        needs_dx, (needs_down, needs_up) = ctx.needs_input_grad[0], _needed(ctx, 6, update)
        dy_TO, bt_RO = dy.flatten(0, -2), update.dense_bt(dy.dtype)
        if needs_dx:
            message = ctx.weight.grad_message(dy_TO, bt_RO, update.blocks)
        else:
            # The lowest adapted linear needs no dX, so the message is dU alone, [T, R].
            message = dy_TO.new_empty(dy_TO.size(0), update.total_rank)
            up_grad_u(message, dy_TO, bt_RO, update.blocks)
        reduced, work = reduce_scatter_rows(message, ctx.group)
        ups = _up_gradients(needs_up, update, dy_TO, u_TR)
        work.wait()
        k = x.size(-1) if needs_dx else 0
        dx_TjK, du_TjR = reduced[:, :k], reduced[:, k:]
        if needs_dx:
            expand(dx_TjK, du_TjR, update.scaled_a(dy.dtype, mask), mask)
        downs = _down_gradients(needs_down, update, du_TjR, x, mask)
        return (dx_TjK.unflatten(0, x.shape[:-1]) if needs_dx else None), None, None, None, None, None, *downs, *ups


class PartialLinear(torch.autograd.Function):
    """P = [X·Wᵀ ∣ (m⊙X)·aᵀ], a partial sum over ranks: [.., K] → [.., O + R].

    Backward returns the gradients of `update.down_parameters`, from which a is computed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: FrozenWeight, update: LowRankUpdate, mask: Mask | None, *parameters: Tensor
    ) -> Tensor:
        partial = weight.partial_message(x.flatten(0, -2), update.scaled_a(x.dtype, mask), mask)
        ctx.save_for_backward(x)
        ctx.weight, ctx.update, ctx.mask = weight, update, mask
        return partial.view(*x.shape[:-1], partial.size(1))

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> Gradients:
        (x,) = ctx.saved_tensors
        update, mask = ctx.update, ctx.mask
        dp_T, dx = dp.flatten(0, -2), None
        if ctx.needs_input_grad[0]:
            dx = ctx.weight.grad_x_of_message(dp_T, update.scaled_a(dp.dtype, mask), mask).view_as(x)
        du_TR = dp_T[:, update.out_features :]
        downs = _down_gradients(any(ctx.needs_input_grad[4:]), update, du_TR, x, mask)
        return dx, None, None, None, *downs


class ReduceExpand(torch.autograd.Function):
    """ReduceScatter of P over token shards, then Y_j = P_j[:, :O] + U_j·bᵀ with U_j = P_j[:, O:].

    Backward returns the gradients of `update.up_parameters`, from which bᵀ is computed.
    """

    @staticmethod
    def forward(
        ctx: Any, partial: Tensor, update: LowRankUpdate, group: ProcessGroup, needs_dx: bool, *parameters: Tensor
    ) -> Tensor:
        reduced, work = reduce_scatter_rows(partial.flatten(0, -2), group)
        work.wait()
        y_TjO, u_TjR = reduced[:, : update.out_features], reduced[:, update.out_features :].contiguous()
        up(y_TjO, u_TjR, update.dense_bt(partial.dtype), update.blocks)
        ctx.u_TjR, ctx.update, ctx.group, ctx.needs_dx = u_TjR, update, group, needs_dx
        return y_TjO.unflatten(0, (partial.size(0) // group.size(), *partial.shape[1:-1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        update, group = ctx.update, ctx.group
        dy_TjO = dy.flatten(0, -2)
        out = update.out_features
        message = dy_TjO.new_empty(dy_TjO.size(0), out * ctx.needs_dx + update.total_rank)
        if ctx.needs_dx:
            message[:, :out] = dy_TjO
        up_grad_u(message[:, out * ctx.needs_dx :], dy_TjO, update.dense_bt(dy.dtype), update.blocks)
        gathered, work = gather_rows(message, group)
        ups = _up_gradients(any(ctx.needs_input_grad[4:]), update, dy_TjO, ctx.u_TjR)
        work.wait()
        if not ctx.needs_dx:
            # PartialLinear reads no dY where no dX is needed: only dU was gathered, and the dY columns stay unwritten.
            du_TR = gathered
            gathered = du_TR.new_empty(du_TR.size(0), out + update.total_rank)
            gathered[:, out:] = du_TR
        return gathered.view(dy.size(0) * group.size(), *dy.shape[1:-1], gathered.size(1)), None, None, None, *ups
