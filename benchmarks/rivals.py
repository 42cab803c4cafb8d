"""Linears to compare ours with where no library has them: frozen ones, and the fastest plain torch.

Legend: T tokens, K inputs and O outputs of the rank's weight, R = Σ r; a [R, K] carries the scale, bᵀ is [R, O].
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lowrank_dist.ops.linear import linear
from lowrank_dist.parallel.collectives import gather_rows, reduce_scatter_rows


class FrozenColumn(torch.autograd.Function):
    """Y = X·Wᵀ, column-parallel, and dX; with `group`, X is a token shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: ProcessGroup | None) -> Tensor:
        x_TK = x.flatten(0, -2)
        if group is not None:
            x_TK, work = gather_rows(x_TK, group)
            work.wait()
        ctx.save_for_backward(weight)
        ctx.group = group
        return linear(x_TK, weight)[:, None]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx_TK = linear(dy.flatten(0, -2), ctx.saved_tensors[0].t())
        if ctx.group is not None:
            dx_TK, work = reduce_scatter_rows(dx_TK, ctx.group)
            work.wait()
        return dx_TK[:, None], None, None


class FrozenRow(torch.autograd.Function):
    """Y = X·Wᵀ, row-parallel, and dX; with `group`, Y is a token shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: ProcessGroup | None) -> Tensor:
        y_TO = linear(x.flatten(0, -2), weight)
        if group is not None:
            y_TO, work = reduce_scatter_rows(y_TO, group)
            work.wait()
        ctx.save_for_backward(weight)
        ctx.group = group
        return y_TO[:, None]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy_TO = dy.flatten(0, -2)
        if ctx.group is not None:
            dy_TO, work = gather_rows(dy_TO, ctx.group)
            work.wait()
        return linear(dy_TO, ctx.saved_tensors[0].t())[:, None], None, None


class EagerLinear(torch.autograd.Function):
    """Y = X·Wᵀ + X̃·aᵀ·b for a [R, K] with the scale in it and a dense b [R, O], by torch's operators alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, bt: Tensor, p: float) -> Tensor:
        dropped, keep = x.flatten(0, -2), None
        if p:
            dropped, keep = torch.native_dropout(dropped, p, True)
        u_TR = dropped @ a.t()
        y_TO = linear(x.flatten(0, -2), weight).addmm_(u_TR, bt)
        ctx.save_for_backward(dropped, keep, u_TR, weight, a, bt)
        ctx.p = p
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, keep, u_TR, weight, a, bt = ctx.saved_tensors
        dy_TO = dy.flatten(0, -2)
        du_TR = dy_TO @ bt.t()
        dx_TK = linear(dy_TO, weight.t())
        if keep is None:
            dx_TK.addmm_(du_TR, a)
        else:
            dx_TK.add_(torch.ops.aten.native_dropout_backward(du_TR @ a, keep, 1 / (1 - ctx.p)))
        return dx_TK.view(*dy.shape[:-1], -1), None, du_TR.t() @ dropped, u_TR.t() @ dy_TO, None
