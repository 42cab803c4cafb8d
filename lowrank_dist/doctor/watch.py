"""An end for what does not end: a file system or a driver that hangs, below where Python could be interrupted."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lowrank_dist.doctor.rows import Row

# Longer than anything takes that is looked at, on a slow network's file system.
LOOK_SECONDS = 120.0


class Watch:
    """hung: told, in a thread of its own, what had been found and what hangs, when `seconds` are over; then the process
    ends with code 1.
    """

    def __init__(self, hung: Callable[[list[Row]], object], seconds: float = LOOK_SECONDS) -> None:
        self._hung = hung
        self._seconds = seconds

    @contextmanager
    def looking(self, what: str, found: Sequence[Row], remedy: str = "see what it stands on") -> Iterator[None]:
        """While the block runs; `found` is what there is to say if it never ends."""
        timer = threading.Timer(self._seconds, self._end, (what, found, remedy))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self, what: str, found: Sequence[Row], remedy: str) -> None:
        try:
            self._hung([*found, Row(what, "broken", f"hangs: no answer within {self._seconds:.0f} s; {remedy}")])
        finally:
            os._exit(1)
