"""Small values from every rank to every rank, as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def gather_json(value: Any, group: ProcessGroup, device: torch.device) -> list[Any]:
    """`value` of every rank of the group, in rank order, on each. device: where the group's tensors live."""
    text = json.dumps(value).encode()
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(text)], device=device), group=group)
    longest = int(sizes.max())
    mine = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(device)
    everyone = torch.empty(group.size() * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(everyone, mine, group=group)
    return [json.loads(part.numpy().tobytes()) for part in everyone.cpu().split(longest)]
