"""Where a piece of Θ lies: coordinates of a rank, as pure functions of its number.

A dense piece is keyed by (tp, pp, dp), a piece of an expert by (ep, expert_dp, pp). Ranks are numbered as Megatron
numbers them (order tp-ep-dp-pp): tensor-parallel ranks are neighbours, pipeline stages furthest apart. An expert is
whole on its rank: ranks that share dense tensors have experts of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class DenseCoordinate(NamedTuple):
    """Of what all data-parallel replicas of a stage have: cut over `tp`, copied over `dp`."""

    tp: int
    pp: int
    dp: int


class ExpertCoordinate(NamedTuple):
    """Of what belongs to an expert: spread over `ep`, copied over `expert_dp`."""

    ep: int
    expert_dp: int
    pp: int


class Place(NamedTuple):
    """Both coordinates of a rank."""

    dense: DenseCoordinate
    expert: ExpertCoordinate


@dataclass(frozen=True)
class Grid:
    """The sizes of a job's parallelism. Its ranks are tensor × data × pipeline.

    expert: expert-parallel size, a divisor of tensor × data: the ranks of a stage are taken up in their order.
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
        """Return where the rank's dense pieces lie."""
        stage, inside = divmod(self._checked(rank), self.tensor * self.data)
        dp, tp = divmod(inside, self.tensor)
        return DenseCoordinate(tp, stage, dp)

    def experts(self, rank: int) -> ExpertCoordinate:
        """Return where the rank's pieces of experts lie."""
        stage, inside = divmod(self._checked(rank), self.tensor * self.data)
        expert_dp, ep = divmod(inside, self.expert)
        return ExpertCoordinate(ep, expert_dp, stage)

    def place(self, rank: int) -> Place:
        """Return both coordinates."""
        return Place(self.dense(rank), self.experts(rank))

    def _checked(self, rank: int) -> int:
        assert 0 <= rank < self.world, f"{rank} is none of {self.world} ranks"
        return rank
