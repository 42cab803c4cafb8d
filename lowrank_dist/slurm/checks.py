"""Checks of a job's layout and time limit before it is submitted."""

from __future__ import annotations

import re

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.json import brief

# Minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds.
_TIME = re.compile(r"(?:(?P<days>\d{1,9})-)?(?P<parts>\d{1,9}(?::\d{1,2}){0,2})")
_ENDLESS = ("UNLIMITED", "INFINITE")


def check_layout(
    nodes: int, ranks_per_node: int, *, tensor: int, data: int | None = None, across_nodes: bool = False
) -> None:
    """Raise UserError where TP × DP is not the number of ranks, or where TP crosses nodes without `across_nodes`.

    tensor, data, across_nodes: as in the section `parallel` of a run's config.

    Tensor-parallel ranks are consecutive and Slurm fills one node after another, so groups stay inside nodes exactly
    where parallel.tensor divides the ranks of a node.
    """
    ranks = nodes * ranks_per_node
    job = f"{nodes} nodes × {ranks_per_node} = {ranks} ranks"
    if ranks % tensor:
        raise UserError(f"parallel.tensor: {tensor} does not divide {job}; it may be {_divisors(ranks, ranks)}")
    if ranks_per_node % tensor and not across_nodes:
        raise UserError(
            f"parallel.tensor: with {tensor} a tensor-parallel group would cross nodes ({job}), where every "
            f"layer waits for the network; it may be {_divisors(ranks_per_node, ranks_per_node)}, or set "
            "parallel.across_nodes=true"
        )
    if data is not None and data * tensor != ranks:
        raise UserError(
            f"parallel.data: {tensor} tensor × {data} data parallel is not {job}; leave it null, "
            f"or write {ranks // tensor}"
        )


def check_time(time: str, lead: int) -> None:
    """Raise UserError where `time` is not a time limit of sbatch, or is not longer than `lead` seconds."""
    if time in _ENDLESS:
        return
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time: {brief(time)} is not a time limit; give minutes, H:MM:SS or D-HH:MM:SS")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [int(match["days"]) * 24 + parts[0], *parts[1:], 0, 0][:3]
    else:
        hours, minutes, seconds = parts if len(parts) == 3 else [0, *parts, 0][:3]
    total = hours * 3600 + minutes * 60 + seconds
    if total <= lead:
        raise UserError(
            f"--lead: a job of --time {time} would be told to stop when it starts ({lead} s of {total} s); "
            "give a longer --time or a shorter --lead"
        )


def _divisors(number: int, largest: int) -> str:
    return ", ".join(str(size) for size in range(1, largest + 1) if number % size == 0)
