"""Things on which ranks must agree before training goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def digest(tensors: Iterable[Tensor]) -> int:
    """A 63-bit hash of the tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return int.from_bytes(sha.digest()[:8], "little") >> 1


def all_equal(value: int, group: ProcessGroup, device: torch.device) -> bool:
    """Whether `value` is the same on every rank of the group; every rank gets the same answer."""
    if group.size() == 1:
        return True
    bounds = torch.tensor([value, -value], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    high, negative_low = bounds.tolist()
    return high == -negative_low


def all_succeeded(ok: bool, group: ProcessGroup, device: torch.device) -> bool:
    """Whether every rank of the group succeeded."""
    flag = torch.tensor([0 if ok else 1], dtype=torch.int64, device=device)
    dist.all_reduce(flag, group=group)
    return flag.item() == 0
