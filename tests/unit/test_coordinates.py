"""parallel/coordinates.py against Megatron's own numbering of ranks, and the keys of the shards of Θ."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator
from torch import nn

from lowrank_dist.parallel.coordinates import Grid, RankCoordinates
from lowrank_dist.parallel.theta import LocalShard, TrainedParameter, mark

ORDER = "tp-cp-ep-dp-pp"
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3)).flatmap(
    lambda sizes: st.sampled_from([n for n in range(1, sizes[0] * sizes[1] + 1) if sizes[0] * sizes[1] % n == 0]).map(
        lambda expert: Grid(*sizes, expert)
    )
)


def groups(grid: Grid, key: Callable[[int], Hashable]) -> list[list[int]]:
    """Return the groups of ranks that share a key, in order."""
    found: dict[Hashable, list[int]] = {}
    for rank in range(grid.world):
        found.setdefault(key(rank), []).append(rank)
    return sorted(found.values())


@settings(max_examples=200, deadline=None)
@given(GRIDS)
def test_groups_are_megatrons(grid: Grid) -> None:
    dense = RankGenerator(tp=grid.tensor, ep=1, dp=grid.data, pp=grid.pipeline, cp=1, order=ORDER)
    replicas = grid.tensor * grid.data // grid.expert
    # Every expert is whole on its rank: expert tensor parallelism is 1.
    experts = RankGenerator(tp=1, ep=grid.expert, dp=replicas, pp=grid.pipeline, cp=1, order=ORDER)
    for name, megatrons, key in (
        ("tp", dense, lambda rank: grid.dense(rank)._replace(tp=0)),
        ("dp", dense, lambda rank: grid.dense(rank)._replace(dp=0)),
        ("pp", dense, lambda rank: grid.dense(rank)._replace(pp=0)),
        ("ep", experts, lambda rank: grid.experts(rank)._replace(ep=0)),
        ("dp", experts, lambda rank: grid.experts(rank)._replace(expert_dp=0)),
        ("pp", experts, lambda rank: grid.experts(rank)._replace(pp=0)),
    ):
        assert groups(grid, key) == sorted(megatrons.get_ranks(name)), name
    assert len({grid.coordinates(rank) for rank in range(grid.world)}) == grid.world


def test_a_coordinate_counts_its_own_group() -> None:
    """The control of the test above, which would not notice two coordinates exchanged within a group."""
    grid = Grid(tensor=2, data=4, pipeline=2, expert=4)
    assert [grid.dense(rank) for rank in (0, 1, 2, 8)] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (0, 1, 0)]
    assert [grid.experts(rank) for rank in (1, 3, 4, 15)] == [(1, 0, 0), (3, 0, 0), (0, 1, 0), (3, 1, 1)]


def trained(sharded: bool, of_expert: bool) -> TrainedParameter:
    parameter = mark(nn.Parameter(torch.zeros(1)), sharded=sharded, partial=not sharded)
    return TrainedParameter(parameter, {}, lambda coordinates: LocalShard((1,), ()), of_expert)


@settings(max_examples=100, deadline=None)
@given(GRIDS, st.booleans(), st.booleans())
def test_every_shard_is_sent_by_its_replicas_alone(grid: Grid, sharded: bool, of_expert: bool) -> None:
    """A checkpoint gets each shard of a sharded parameter, and one copy of a replicated one, from all its replicas."""
    each, senders = trained(sharded, of_expert), {}
    for coordinates in map(grid.coordinates, range(grid.world)):
        if each.is_sent_by(coordinates):
            senders.setdefault(each.shard_key(coordinates), set()).add(coordinates)
    across = (grid.expert if of_expert else grid.tensor) if sharded else 1
    assert len(senders) == across * grid.pipeline
    replicas = grid.tensor * grid.data // grid.expert if of_expert else grid.data
    assert all(len(senders_of_shard) == replicas for senders_of_shard in senders.values())


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_that_is_not_there(rank: int) -> None:
    with pytest.raises(AssertionError, match="none of 8 ranks"):
        Grid(2, 4).coordinates(rank)


def test_the_place_of_one_process() -> None:
    assert Grid(1, 1).coordinates(0) == RankCoordinates((0, 0, 0), (0, 0, 0))
