"""The vocabulary projection: loss on target positions, and whole logits.

Legend: n target positions, H hidden, V_i rows of the head on this rank (vocabulary padding cut off), N ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lowrank_dist.ops.linear import linear
from lowrank_dist.parallel.collectives import all_gather_columns, all_reduce

# Largest block of fp32 logits in bytes; one exists at a time. The larger the vocabulary, the fewer positions it has.
LOGIT_BLOCK_BYTES = 128 * 2**20


class OutputLayer(nn.Module):
    """This rank's rows of the vocabulary projection, padding included: weight [rows, H]. The functions below use it."""

    def __init__(self, rows: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden, dtype=dtype))


class HeadLoss(torch.autograd.Function):
    """Σ −log p(target) over n positions, for a head sharded over the vocabulary.

    The gradients, dH = (p − onehot)·W and for a trained head dW = (p − onehot)ᵀ·H, are formed while the logits of a
    block exist; no logits outlive forward. p is the softmax. A block has two reductions: the maximum, and
    [Σ exp ∣ target logit].
    reduce_dgrad: dH, a partial sum over vocabulary shards, is all-reduced here (without sequence parallelism).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nH: Tensor,
        weight_VH: Tensor,
        targets_n: Tensor,
        first_id: int,
        padded_rows: int,
        group: ProcessGroup,
        reduce_dgrad: bool,
    ) -> Tensor:
        # Computed from the padded rows, whose number is the same on every rank: blocks are all-reduced, so all ranks
        # must use the same blocks.
        block = max(1, LOGIT_BLOCK_BYTES // (4 * padded_rows))
        needs_grad = ctx.needs_input_grad[0]
        grad_nH = torch.empty_like(hidden_nH) if needs_grad else None
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = hidden_nH.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden_nH.size(0), block):
            rows = slice(start, start + block)
            loss, grad = _block(hidden_nH[rows], weight_VH, targets_n[rows] - first_id, group, needs_grad, grad_VH)
            total += loss
            if grad_nH is not None and grad is not None:
                grad_nH[rows] = grad
        ctx.grad_nH, ctx.grad_VH = grad_nH, None if grad_VH is None else grad_VH.to(weight_VH.dtype)
        ctx.group, ctx.reduce_dgrad = group, reduce_dgrad
        return total

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # Multiplied before the reduction, in place: nothing reads the unit gradient again.
        grad_nH = ctx.grad_nH.mul_(dloss.to(ctx.grad_nH.dtype))
        if ctx.reduce_dgrad:
            all_reduce(grad_nH, ctx.group).wait()
        grad_VH = None if ctx.grad_VH is None else ctx.grad_VH.mul_(dloss.to(ctx.grad_VH.dtype))
        return grad_nH, grad_VH, None, None, None, None, None


def _block(
    hidden: Tensor,
    weight: Tensor,
    local_targets: Tensor,
    group: ProcessGroup,
    needs_grad: bool,
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss and this rank's part of the gradient with respect to `hidden`, for one block of positions.

    weight_grad: fp32 accumulator for the gradient of a trained head.
    """
    logits = linear(hidden, weight).float()
    if weight.size(0):
        peak = logits.amax(dim=-1, keepdim=True)
    else:  # a rank that holds nothing but vocabulary padding
        peak = logits.new_full((logits.size(0), 1), -torch.inf)
    if group.size() > 1:
        all_reduce(peak, group, dist.ReduceOp.MAX).wait()
    logits.sub_(peak)
    mine = (local_targets >= 0) & (local_targets < weight.size(0))
    column = local_targets.where(mine, 0)[:, None]
    target = logits.gather(1, column).where(mine[:, None], 0.0) if weight.size(0) else torch.zeros_like(peak)
    logits.exp_()
    sums = torch.cat((logits.sum(dim=-1, keepdim=True), target), dim=-1)
    if group.size() > 1:
        all_reduce(sums, group).wait()
    loss = (sums[:, 0].log() - sums[:, 1]).sum()
    if not needs_grad:
        return loss, None
    # Σ_v exp(l_v)·W_v is divided by Σ exp afterwards: one pass over n×H instead of one over n×V.
    grad = linear(logits.to(weight.dtype), weight.t()).float().div_(sums[:, :1])
    if weight.size(0):
        grad -= weight[column[:, 0]] * mine[:, None]
        if weight_grad is not None:
            logits.div_(sums[:, :1]).scatter_add_(1, column, -mine[:, None].float())
            weight_grad += logits.to(hidden.dtype).t() @ hidden
    return loss, grad.to(hidden.dtype)


def gathered_logits(hidden_nH: Tensor, weight_VH: Tensor, vocab: int, group: ProcessGroup) -> Tensor:
    """Return the logits of all vocabulary shards, [n, vocab], on every rank, without the padding in `weight_VH`."""
    return all_gather_columns(hidden_nH @ weight_VH.t(), group)[:, :vocab]
