"""Ranks whose clocks show different dates: a run has one start time, set by rank 0 and kept in checkpoints."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.unit.test_checkpoint_folder import state_of

DAY = datetime(2026, 11, 30, 23, 59, 59)


def begun_on(days: list[int], kept: str | None) -> str:
    """On one rank, whose clock is off by days: return the run's start time. kept: the checkpoint's, if there is one."""
    from lowrank_dist.engine import resume

    topology: Any = ranks.topology(1, False)
    present = DAY + timedelta(days=days[topology.world_group.rank()])
    resumption = None
    if kept is not None:
        state = state_of(2).model_copy(update={"started_at": datetime.fromisoformat(kept)})
        resumption = resume.Resumption(Path("step-2"), state, ())
    clock = SimpleNamespace(now=lambda: present, fromisoformat=datetime.fromisoformat)
    with mock.patch.object(resume, "datetime", clock):
        return resume.started_at(resumption, topology).isoformat()


def test_ranks_on_different_dates_are_told_one_moment() -> None:
    assert run_ranks(2, begun_on, [0, 1], None) == ["2026-11-30T23:59:59"] * 2
    assert run_ranks(2, begun_on, [1, 0], None) == ["2026-12-01T23:59:59"] * 2
    assert run_ranks(2, begun_on, [5, 6], "2026-11-30T23:59:59") == ["2026-11-30T23:59:59"] * 2
