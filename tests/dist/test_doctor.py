"""Doctor's all-reduce on real ranks: its measurements, and that a wrong sum is not reported as a measurement."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from unittest import mock

import pytest

from tests.dist.ranks import device, run_ranks


def measured(library: str) -> dict[str, Any]:
    from lowrank_dist.doctor import links

    with mock.patch.dict(links.LARGE_BYTES, {device().type: 2**20}):
        return asdict(links.measure(None, device(), library))


def in_nodes(nodes: list[list[int]]) -> int | None:
    """Return the size of the group of this rank's node; None without a group."""
    import torch.distributed as dist

    from lowrank_dist.doctor import links

    group = links.node_group(nodes, 60)
    if group is None:
        return None
    with mock.patch.dict(links.LARGE_BYTES, {device().type: 2**20}):
        ranks = links.measure(group, device(), "gloo").ranks
    dist.destroy_process_group(group)
    return ranks


def with_a_wrong_sum() -> str:
    import torch.distributed as dist

    from lowrank_dist.doctor import links

    reduce = dist.all_reduce

    def forgetful(tensor: Any, group: Any = None) -> None:
        reduce(tensor, group=group)
        tensor[-1] = 0  # as a link that loses a packet would

    with mock.patch.object(dist, "all_reduce", forgetful), mock.patch.dict(links.LARGE_BYTES, {device().type: 2**20}):
        try:
            links.measure(None, device(), "gloo")
        except RuntimeError as error:
            return str(error)
    return "measured"


@pytest.mark.parametrize("size", [2, 4])
def test_bandwidth_is_the_messages_over_the_time(size: int) -> None:
    from lowrank_dist.doctor.links import all_reduce_row

    for found in run_ranks(size, measured, "gloo"):
        assert (found["ranks"], found["message_bytes"]) == (size, 2**20)
        assert found["busbw_gb_s"] == pytest.approx(found["algbw_gb_s"] * 2 * (size - 1) / size)
        # A message of eight bytes takes less time than one of a million.
        assert 0 < found["latency_s"] and 0 < found["algbw_gb_s"] < 1000
        shown = all_reduce_row("all-reduce", found)
        assert f"1.0 MiB over {size} ranks by gloo" in shown.detail and "library" not in shown.figures


def test_every_node_has_a_group_of_its_own() -> None:
    assert run_ranks(4, in_nodes, [[0, 2], [1, 3]]) == [2, 2, 2, 2]
    assert run_ranks(4, in_nodes, [[0], [1, 2, 3]]) == [None, 3, 3, 3]
    assert run_ranks(4, in_nodes, [[0, 1, 2, 3]]) == [None] * 4


def test_a_wrong_sum_is_an_error() -> None:
    for said in run_ranks(2, with_a_wrong_sum):
        assert said == "the all-reduce of 1 … 2 gave 0 to 3, not 3"
