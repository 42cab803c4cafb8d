"""The bandwidth between ranks, measured by an all-reduce over all of them, and over those of one node."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lowrank_dist.backend.devices import synchronize
from lowrank_dist.doctor.rows import Row, format_size

# Large enough to be limited by bandwidth, small enough to take at most a second over 1 Gbit/s.
LARGE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
SMALL_BYTES = 8
REPEATS = 5


@dataclass(frozen=True)
class AllReduce:
    """The timing of an all-reduce on one rank.

    algbw: message bytes per second. busbw = algbw · 2(n − 1)/n: the rate on each rank's link in a ring of n
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). Both are in GB/s, of 10⁹ bytes. latency:
    seconds for a message of 8 bytes.
    """

    ranks: int
    library: str
    message_bytes: int
    algbw_gb_s: float
    busbw_gb_s: float
    latency_s: float


def join_group(store: dist.Store, rank: int, size: int, library: str, seconds: float) -> None:
    """Join the process group of all ranks, as a run has it: gloo, and NCCL beside it where the ranks have GPUs."""
    backend = "gloo" if library == "gloo" else f"cpu:gloo,cuda:{library}"
    group_store = dist.PrefixStore("group", store)
    # NCCL ends the process at its time-out; the TimeLimit must report before that.
    seconds += 0 if library == "gloo" else 30
    dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))


def node_group(nodes: Sequence[Sequence[int]], seconds: float) -> dist.ProcessGroup | None:
    """Return the group of this rank's node. None where the job has one node, or this node has one rank.

    nodes: the ranks of every node.
    """
    mine = next(ranks for ranks in nodes if dist.get_rank() in ranks)
    if len(nodes) == 1 or len(mine) == 1:
        return None
    return dist.new_group(list(mine), timeout=timedelta(seconds=seconds), use_local_synchronization=True)


def measure(group: dist.ProcessGroup | None, device: torch.device, library: str) -> AllReduce:
    """Time an all-reduce over `group` (None: all ranks). Raises RuntimeError where it fails or the sum is wrong."""
    size = dist.get_world_size(group)
    message = torch.empty(LARGE_BYTES[device.type] // 4, device=device)
    _check_sum(message, group, size)
    large = _median_seconds(message, group, device)
    small = _median_seconds(message[: SMALL_BYTES // 4], group, device)
    algbw = message.nbytes / large / 1e9
    return AllReduce(size, library, message.nbytes, algbw, algbw * 2 * (size - 1) / size, small)


def _check_sum(message: torch.Tensor, group: dist.ProcessGroup | None, size: int) -> None:
    message.fill_(dist.get_rank(group) + 1)
    dist.all_reduce(message, group=group)
    expected = size * (size + 1) / 2
    if not bool((message == expected).all()):
        raise RuntimeError(
            f"the all-reduce of 1 … {size} gave {message.min():g} to {message.max():g}, not {expected:g}"
        )


def _median_seconds(message: torch.Tensor, group: dist.ProcessGroup | None, device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS):
        message.zero_()  # sums of sums would overflow
        dist.barrier(group=group)
        synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(message, group=group)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def all_reduce_row(what: str, found: Mapping[str, float]) -> Row:
    """Return a row on an `AllReduce`, given as a mapping."""
    detail = (
        f"{format_size(found['message_bytes'])} over {found['ranks']} ranks by {found['library']}: "
        f"{found['algbw_gb_s']:.2f} GB/s algbw, {found['busbw_gb_s']:.2f} GB/s busbw; "
        f"{SMALL_BYTES} bytes in {found['latency_s'] * 1e6:.0f} µs"
    )
    figures = {name: value for name, value in found.items() if name != "library"}
    return Row(what, "ok", detail, figures=figures)


def leave_group() -> None:
    """Leave the group. All ranks leave together, so that none waits in a barrier for peers that are gone."""
    dist.barrier()
    dist.destroy_process_group()
