"""Things on which ranks must agree before training goes on."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_NAME_BYTES = 64  # HOST_NAME_MAX of Linux


def digest(tensors: Iterable[Tensor]) -> int:
    """A 63-bit hash of the tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(sha.digest()[:8], "little") >> 1


def all_equal(value: int, flag: bool, group: ProcessGroup, device: torch.device) -> tuple[bool, bool]:
    """Whether `value` is the same on every rank of the group, and whether any rank raised `flag`: one message."""
    if group.size() == 1:
        return True, flag
    bounds = torch.tensor([value, -value, flag], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    high, negative_low, flagged = bounds.tolist()
    return high == -negative_low, bool(flagged)


def all_succeeded(ok: bool, group: ProcessGroup, device: torch.device) -> bool:
    """Whether every rank of the group succeeded."""
    flag = torch.tensor([0 if ok else 1], dtype=torch.int64, device=device)
    dist.all_reduce(flag, group=group)
    return flag.item() == 0


def every_value(value: float, group: ProcessGroup, device: torch.device) -> list[float]:
    """The value of every rank of the group, in rank order."""
    values = torch.empty(group.size(), dtype=torch.float64, device=device)
    own = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(values, own, group=group)
    return values.tolist()


def host_names(group: ProcessGroup) -> tuple[str, ...]:
    """The name of the host of every rank of a gloo group, in rank order."""
    own = torch.zeros(_NAME_BYTES, dtype=torch.uint8)
    name = socket.gethostname().encode()[:_NAME_BYTES]
    own[: len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
    names = torch.empty(group.size() * _NAME_BYTES, dtype=torch.uint8)
    dist.all_gather_into_tensor(names, own, group=group)
    return tuple(bytes(row.tolist()).rstrip(b"\0").decode() for row in names.view(-1, _NAME_BYTES))
