"""Signals that ask a run to stop: noted when they come, obeyed at the end of a step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

# Slurm's warning before the time is over (--signal), its preemption, and what launchers and people send.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class StopRequest:
    """While it is entered, the first of SIGNALS is remembered and any further one changes nothing."""

    def __init__(self) -> None:
        self.told_at: float | None = None
        self.by = ""

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def told(self) -> bool:
        return self.told_at is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.told_at is None:
            self.told_at, self.by = time.monotonic(), signal.Signals(number).name
