"""The collectives of this project: raw ones, differentiable ones, and agreement between ranks.

Rows of a 2-D tensor over one process group; below them Megatron's differentiable ones, which a method's own column- and
row-parallel products need; then values on which ranks must agree before training goes on.

Legend: T tokens of the whole sequence, T_j the tokens of this rank's shard (T / N), C columns.
Every call is one message; the process group is an argument, never a global.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from lowrank_dist.backend.devices import WAITS

_NAME_BYTES = 64  # HOST_NAME_MAX of Linux


@dataclass(frozen=True)
class Pending:
    """A collective on its way. Time in `wait` counts as waiting for other ranks."""

    work: Work

    def wait(self) -> None:
        with WAITS.waiting():
            self.work.wait()


def gather_rows(shard_TjC: Tensor, group: ProcessGroup) -> tuple[Tensor, Pending]:
    """Start gathering the row shards of all ranks, in rank order. Returns ([T, C], handle to wait on)."""
    gathered_TC = shard_TjC.new_empty(shard_TjC.size(0) * group.size(), shard_TjC.size(1))
    work = dist.all_gather_into_tensor(gathered_TC, shard_TjC.contiguous(), group=group, async_op=True)
    return gathered_TC, Pending(work)


def reduce_scatter_rows(partial_TC: Tensor, group: ProcessGroup) -> tuple[Tensor, Pending]:
    """Start summing over ranks, each keeping its rows. Returns ([T / N, C], handle to wait on)."""
    shard_TjC = partial_TC.new_empty(partial_TC.size(0) // group.size(), partial_TC.size(1))
    work = dist.reduce_scatter_tensor(shard_TjC, partial_TC.contiguous(), group=group, async_op=True)
    return shard_TjC, Pending(work)


def all_reduce(tensor: Tensor, group: ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """Start reducing `tensor` in place over the group."""
    return Pending(dist.all_reduce(tensor, op=op, group=group, async_op=True))


def all_gather_columns(shard_TC: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenate column shards in rank order: [T, C] on each rank → [T, C · N]."""
    if group.size() == 1:
        return shard_TC
    shards = [torch.empty_like(shard_TC) for _ in range(group.size())]
    dist.all_gather(shards, shard_TC.contiguous(), group=group)
    return torch.cat(shards, dim=-1)


def enter_parallel_region(x: Tensor, group: ProcessGroup, *, sequence_parallel: bool) -> Tensor:
    """The input of a column-parallel product: every token on every rank. Differentiable.

    [s / N, b, H] → [s, b, H] under sequence parallelism, whose gradient is reduce-scattered; else `x` itself, whose
    gradient is all-reduced.
    """
    if sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    return mappings.copy_to_tensor_model_parallel_region(x, group=group)


def leave_parallel_region(partial_sbH: Tensor, group: ProcessGroup, *, sequence_parallel: bool) -> Tensor:
    """The summed output of a row-parallel product; under sequence parallelism this rank's tokens. Differentiable."""
    if sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(partial_sbH, group=group)
    return mappings.reduce_from_tensor_model_parallel_region(partial_sbH, group=group)


def digest(tensors: Iterable[Tensor]) -> int:
    """Return a 63-bit hash of the tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(sha.digest()[:8], "little") >> 1


def all_equal(value: int, flag: bool, group: ProcessGroup, device: torch.device) -> tuple[bool, bool]:
    """Return whether `value` is the same on every rank of the group, and whether any raised `flag`: one message."""
    if group.size() == 1:
        return True, flag
    bounds = torch.tensor([value, -value, flag], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    high, negative_low, flagged = bounds.tolist()
    return high == -negative_low, bool(flagged)


def every_value(value: float, group: ProcessGroup, device: torch.device) -> list[float]:
    """Return the value of every rank of the group, in rank order."""
    values = torch.empty(group.size(), dtype=torch.float64, device=device)
    own = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(values, own, group=group)
    return values.tolist()


def host_names(group: ProcessGroup) -> tuple[str, ...]:
    """Return the name of the host of every rank of a gloo group, in rank order."""
    own = torch.zeros(_NAME_BYTES, dtype=torch.uint8)
    name = socket.gethostname().encode()[:_NAME_BYTES]
    own[: len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
    names = torch.empty(group.size() * _NAME_BYTES, dtype=torch.uint8)
    dist.all_gather_into_tensor(names, own, group=group)
    return tuple(bytes(row.tolist()).rstrip(b"\0").decode() for row in names.view(-1, _NAME_BYTES))
