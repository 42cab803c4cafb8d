"""A message board for the ranks of a job, and the comparison of the nodes' clocks over it.

Messages are JSON values under names in the job's store. The store needs only MASTER_ADDR and MASTER_PORT, so ranks can
report why they cannot meet in a process group.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lowrank_dist.backend.rendezvous import MeetingPlace, open_store
from lowrank_dist.doctor.local import Place
from lowrank_dist.doctor.rows import Row
from lowrank_dist.errors import UserError

# Pauses between polls for a message. The store's own wait is not used: it warns at each time-out and ignores signals.
_FIRST_PAUSE_SECONDS = 0.0005
_LONGEST_PAUSE_SECONDS = 0.25
# Time that a store that was reached may take to answer, on a busy machine.
ANSWER_SECONDS = 30.0
PREFIX = "lowrank_dist.doctor"
# Round trips per comparison of two clocks, as in NTP.
ROUNDS = 8
# With a larger offset files seem to come from the future, and log lines of two nodes cannot be put in order.
TOLERATED_SECONDS = 1.0


class NoAnswer(Exception):
    """No message arrived under a name in time, or the store is gone."""


class Unreached(NoAnswer):
    """The job's store cannot be opened or reached. The text has the cause and the remedy."""


class Board:
    """JSON messages under names in the job's store."""

    def __init__(self, store: dist.Store) -> None:
        self.store = store

    @classmethod
    def join(cls, place: Place, seconds: float) -> Board:
        """Return the board of the job's store, which rank 0 opens unless the launcher has.

        Raises Unreached where the store is not opened or reached in time.
        """
        meeting = MeetingPlace(place.master, place.port, place.rank, place.size, place.agent)
        try:
            store = open_store(meeting, seconds)
        except UserError as error:
            raise Unreached(str(error)) from error
        store.set_timeout(timedelta(seconds=max(seconds, ANSWER_SECONDS)))
        return cls(dist.PrefixStore(PREFIX, store))

    def put(self, name: str, value: Any) -> None:
        """Write a message under a name. Raises NoAnswer where the store is gone."""
        try:
            self.store.set(name, json.dumps(value))
        except RuntimeError as error:
            raise NoAnswer(f"{name}: {error}") from error

    def take(self, name: str, seconds: float) -> Any:
        """Wait for the message under `name`, and return it. Raises NoAnswer after `seconds` or without a store."""
        end = time.monotonic() + seconds
        pause = _FIRST_PAUSE_SECONDS
        try:
            while not self.store.check([name]):
                if time.monotonic() > end:
                    raise NoAnswer(name)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            return json.loads(self.store.get(name))
        except RuntimeError as error:
            raise NoAnswer(f"{name}: {error}") from error


def answer_clock(board: Board, ranks: Sequence[int], seconds: float, clock: Callable[[], float] = time.time) -> None:
    """Answer the time requests of each of `ranks`, one rank after the other: the other side of `clock_offset`."""
    for rank in ranks:
        for number in range(ROUNDS):
            board.take(f"clock/{rank}/{number}", seconds)
            board.put(f"clock/{rank}/{number}/answer", clock())


def clock_offset(
    board: Board, rank: int, seconds: float, clock: Callable[[], float] = time.time
) -> tuple[float, float]:
    """Return the seconds that this node's clock is ahead of the answering node's, and a bound of the error.

    The shortest round trip counts: the answer was given somewhere within it, so half of it bounds the error.
    """
    best = (0.0, float("inf"))
    for number in range(ROUNDS):
        asked = clock()
        board.put(f"clock/{rank}/{number}", None)
        there = board.take(f"clock/{rank}/{number}/answer", seconds)
        heard = clock()
        if (heard - asked) / 2 < best[1]:
            best = ((asked + heard) / 2 - there, (heard - asked) / 2)
    return best


def clock_skew(offsets: Mapping[str, tuple[float, float]], reference: str) -> list[Row]:
    """Return a row on the offsets of the clocks. offsets: node → `clock_offset` against the clock of `reference`."""
    if not offsets:
        return []
    figures = {f"{node}_seconds": ahead for node, (ahead, _) in offsets.items()}
    error = max(error for _, error in offsets.values())
    off = {node: ahead for node, (ahead, error) in offsets.items() if abs(ahead) - error > TOLERATED_SECONDS}
    if off:
        said = ", ".join(
            f"{node} is {abs(ahead):.3g} s {'ahead of' if ahead > 0 else 'behind'} {reference}"
            for node, ahead in off.items()
        )
        detail = f"{said} (± {error * 1e3:.1f} ms); run chrony or ntpd on all nodes"
        return [Row("clocks", "warning", detail, figures=figures)]
    most = max(abs(ahead) for ahead, _ in offsets.values())
    detail = f"at most {most * 1e3:.1f} ms (± {error * 1e3:.1f} ms) from {reference}'s"
    return [Row("clocks", "ok", detail, figures=figures)]
