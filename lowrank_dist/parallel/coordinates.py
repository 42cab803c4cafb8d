"""Coordinates of a rank in the parallel layout, as pure functions of its number.

They decide which slices of the trained parameters Θ a rank holds. A dense slice is keyed by (tp, pp, dp), a slice of an
expert by (ep, expert_dp, pp). Ranks are numbered as Megatron numbers them (order tp-ep-dp-pp): tensor-parallel ranks
are neighbours, pipeline stages furthest apart. An expert lies whole on a rank; ranks that hold shards of the same dense
tensors hold different experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class DenseCoordinate(NamedTuple):
    """Coordinate of the dense slices of a pipeline stage `pp`: cut over `tp`, copied over `dp`."""

    tp: int
    pp: int
    dp: int


class ExpertCoordinate(NamedTuple):
    """Coordinate of the expert slices of a pipeline stage `pp`: spread over `ep`, copied over `expert_dp`."""

    ep: int
    expert_dp: int
    pp: int


class RankCoordinates(NamedTuple):
    """Both coordinates of a rank."""

    dense: DenseCoordinate
    expert: ExpertCoordinate


@dataclass(frozen=True)
class Grid:
    """The sizes of a job's parallelism. The number of ranks is tensor × data × pipeline.

    expert: expert-parallel size, a divisor of tensor × data. An expert-parallel group is consecutive ranks of a stage.
    """

    tensor: int
    data: int
    pipeline: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        assert min(self.tensor, self.data, self.pipeline, self.expert) >= 1
        assert (self.tensor * self.data) % self.expert == 0, "experts are spread over the ranks of one stage"

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.data * self.pipeline

    def dense(self, rank: int) -> DenseCoordinate:
        """Return the coordinate of the rank's dense slices."""
        stage, inside = divmod(self._checked(rank), self.tensor * self.data)
        dp, tp = divmod(inside, self.tensor)
        return DenseCoordinate(tp, stage, dp)

    def experts(self, rank: int) -> ExpertCoordinate:
        """Return the coordinate of the rank's expert slices."""
        stage, inside = divmod(self._checked(rank), self.tensor * self.data)
        expert_dp, ep = divmod(inside, self.expert)
        return ExpertCoordinate(ep, expert_dp, stage)

    def coordinates(self, rank: int) -> RankCoordinates:
        """Return both coordinates."""
        return RankCoordinates(self.dense(rank), self.experts(rank))

    def _checked(self, rank: int) -> int:
        assert 0 <= rank < self.world, f"{rank} is none of {self.world} ranks"
        return rank
