"""The collectives of this project: raw ones, differentiable ones, and checks that ranks agree.

First come collectives over the rows of a 2-D tensor, then Megatron's differentiable ones for a method's own column- and
row-parallel products, then values on which ranks must agree before training goes on.

Legend: N ranks of the group, T tokens of the whole sequence, T_j = T / N those of this rank's shard, C columns; s
sequence length, b microbatch, H hidden.
A call is one message unless its docstring says otherwise. The process group is an argument, never a global.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from lowrank_dist.backend.devices import WAIT_TIMER
from lowrank_dist.backend.node import node_id, node_names
from lowrank_dist.errors import UserError, some_of


@dataclass(frozen=True)
class Pending:
    """A collective that has been started. Time in `wait` counts as waiting for other ranks."""

    work: Work

    def wait(self) -> None:
        with WAIT_TIMER.measure():
            self.work.wait()


def gather_rows(shard_TjC: Tensor, group: ProcessGroup) -> tuple[Tensor, Pending]:
    """Start gathering the row shards of all ranks, in rank order. Returns ([T, C], handle to wait on)."""
    gathered_TC = shard_TjC.new_empty(shard_TjC.size(0) * group.size(), shard_TjC.size(1))
    work = dist.all_gather_into_tensor(gathered_TC, shard_TjC.contiguous(), group=group, async_op=True)
    return gathered_TC, Pending(work)


def reduce_scatter_rows(partial_TC: Tensor, group: ProcessGroup) -> tuple[Tensor, Pending]:
    """Start summing over ranks; each rank gets the rows of its shard. Returns ([T_j, C], handle to wait on)."""
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
    """Return the input of a column-parallel product, with every token on every rank. Differentiable.

    With sequence parallelism: [s / N, b, H] → [s, b, H], and the gradient is reduce-scattered. Without: `x` itself, and
    the gradient is all-reduced.
    """
    if sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    return mappings.copy_to_tensor_model_parallel_region(x, group=group)


def leave_parallel_region(partial_sbH: Tensor, group: ProcessGroup, *, sequence_parallel: bool) -> Tensor:
    """Return the output of a row-parallel product, summed over ranks. Differentiable.

    With sequence parallelism each rank gets its own tokens: [s, b, H] → [s / N, b, H].
    """
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
    """Return whether `value` is the same on every rank of the group, and whether any rank has `flag` set."""
    if group.size() == 1:
        return True, flag
    bounds = torch.tensor([value, -value, flag], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    high, negative_low, flagged = bounds.tolist()
    return high == -negative_low, bool(flagged)


def gather_values(value: float, group: ProcessGroup, device: torch.device) -> list[float]:
    """Return the value of every rank of the group, in rank order."""
    values = torch.empty(group.size(), dtype=torch.float64, device=device)
    own = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(values, own, group=group)
    return values.tolist()


def gather_texts(own: str, group: ProcessGroup, device: torch.device) -> list[str]:
    """Return the text of every rank of the group, in rank order. Two messages."""
    data = own.encode(errors="replace")
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(data)], device=device), group=group)
    longest = max(int(sizes.max()), 1)
    padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8).to(device)
    texts = torch.empty(group.size() * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(texts, padded, group=group)
    rows = texts.cpu().view(-1, longest).numpy()
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes.tolist(), strict=True)]


def host_names(group: ProcessGroup) -> tuple[str, ...]:
    """Return the name of every rank's node (`node_names`), in the rank order of a gloo group. Two messages."""
    return node_names(gather_texts(node_id(), group, torch.device("cpu")))


def require_agreement(own: Mapping[str, str], group: ProcessGroup, device: torch.device, remedy: str) -> None:
    """Raise the same UserError on every rank where `own` (name → value) differs between ranks of the group.

    The error lists which ranks hold which value. Collective; two messages, four where values differ.
    """
    if group.size() == 1:
        return
    # Hashes first: the values are sent only where the hashes differ.
    if len(set(gather_texts(_hash(own), group, device))) == 1:
        return
    everyone = [json.loads(text) for text in gather_texts(json.dumps([node_id(), own]), group, device)]
    hosts = node_names([identity for identity, _ in everyone])
    differing = []
    for name in dict.fromkeys(name for _, values in everyone for name in values):
        holders: dict[str, list[int]] = {}
        for rank, (_, values) in enumerate(everyone):
            holders.setdefault(values.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            said = (f"{value} on {_named(ranks, hosts[ranks[0]])}" for value, ranks in holders.items())
            differing.append(f"{name} is {', '.join(said)}")
    raise UserError(f"the ranks of this run differ: {'; '.join(differing)}. {remedy}")


def _hash(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _named(ranks: Sequence[int], host: str) -> str:
    """Return the ranks as text for a message. host: the host of the first rank."""
    return f"rank {ranks[0]} ({host})" if len(ranks) == 1 else f"ranks {some_of([str(rank) for rank in ranks])}"
