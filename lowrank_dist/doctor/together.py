"""All ranks of a job look at their nodes and at what lies between these; rank 0 puts the answers together (lead.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from lowrank_dist.doctor.board import Board, Silent
from lowrank_dist.doctor.findings import Examination
from lowrank_dist.doctor.lead import Lead
from lowrank_dist.doctor.member import GRACE_SECONDS, Member, Roll, leave
from lowrank_dist.doctor.place import Place
from lowrank_dist.errors import UserError, some_of

if TYPE_CHECKING:
    from lowrank_dist.config import Config


def examine_together(
    place: Place, config: Config | None, refused: str | None, seconds: float, publish: Callable[[Examination], int]
) -> int:
    """One rank's part; returns the exit code, the same on every rank.

    config: as this rank read it; refused: why it could not. seconds: how long ranks wait for one another to come.
    publish: on rank 0, shows what was found and says with which code all ranks are to end.

    Raises RuntimeError where the job's store is not reached, Silent where rank 0 is gone, UserError (rank 0 alone)
    where the input was refused.
    """
    start = time.monotonic()
    board = Board.join(place, seconds)
    board.put(f"here/{place.rank}", {"host": place.host, "refused": refused})
    if place.rank == 0:
        roll = call_roll(board, place.size, seconds - (time.monotonic() - start))
        board.put("roll", asdict(roll))
    else:
        roll = Roll(**board.take("roll", 2 * seconds + GRACE_SECONDS))
    try:
        if roll.refused:
            if place.rank == 0:
                raise UserError("\n".join(f"{node}: {text}" for node, text in _once(roll.refused).items()))
            return 2
        if place.rank != 0:
            return Member(place, config, seconds, board, roll).take_part()
        return Lead(place, config, seconds, board, roll, publish).lead(time.monotonic() - start)
    finally:
        leave(board, place, roll)


def call_roll(board: Board, size: int, seconds: float) -> Roll:
    """Wait until all ranks came, or the time is over."""
    end = time.monotonic() + seconds
    ranks: dict[str, list[int]] = {}
    absent, refused = [], {}
    for rank in range(size):
        try:
            said = board.take(f"here/{rank}", max(end - time.monotonic(), 0.01))
        except Silent:
            absent.append(rank)
            continue
        ranks.setdefault(said["host"], []).append(rank)
        if said["refused"] is not None:
            refused.setdefault(said["host"], said["refused"])
    return Roll(ranks, absent, refused)


def _once(refused: Mapping[str, str]) -> dict[str, str]:
    """A complaint that several nodes have in common once, under the names of all."""
    nodes: dict[str, list[str]] = {}
    for node, text in refused.items():
        nodes.setdefault(text, []).append(node)
    return {some_of(names): text for text, names in nodes.items()}
