"""How far the nodes' clocks are apart, measured as NTP does: by round trips over the board."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from lowrank_dist.doctor.board import Board
from lowrank_dist.doctor.rows import Row

ROUNDS = 8
# Beyond it files seem to come from the future, and log lines of two nodes cannot be put in order.
TOLERATED_SECONDS = 1.0


def answer(board: Board, ranks: Sequence[int], seconds: float, clock: Callable[[], float] = time.time) -> None:
    """Tell each of `ranks`, one after the other, what time it is here, as often as they ask (`offset`)."""
    for rank in ranks:
        for number in range(ROUNDS):
            board.take(f"clock/{rank}/{number}", seconds)
            board.put(f"clock/{rank}/{number}/answer", clock())


def offset(board: Board, rank: int, seconds: float, clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """Seconds that this node's clock is ahead of the answering one's, and by how much that may be wrong.

    Of all round trips the shortest counts: the answer was given somewhere within it, so half of it bounds the error.
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


def skew(offsets: Mapping[str, tuple[float, float]], reference: str) -> list[Row]:
    """offsets: node → `offset` against the clock of `reference`."""
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
        detail = f"{said} (± {error * 1e3:.1f} ms); let chrony or ntpd set the clocks of all nodes"
        return [Row("clocks", "warning", detail, figures=figures)]
    most = max(abs(ahead) for ahead, _ in offsets.values())
    detail = f"at most {most * 1e3:.1f} ms (± {error * 1e3:.1f} ms) from {reference}'s"
    return [Row("clocks", "ok", detail, figures=figures)]
