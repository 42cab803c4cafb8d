"""State shared by a rank and its watchdog: the rank's phase, and the signals that ask its run to stop."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass
from types import FrameType, TracebackType

# Phases in their order. In STARTING the watchdog only checks that the rank computes or reads at all, since loading 175B
# takes as long as the disk needs. In TRAINING a phase is timed from its beginning. In ENDING all ranks wait for each
# other a last time.
STARTING = ("start", "meeting", "model", "data set", "optimiser state")
ENDING = "end"
TRAINING = ("data", "forward", "backward", "reduction", "optimiser", "evaluation", "checkpoint", ENDING)
# The last phase of the process, after success or failure. The rank has reported its end, or is about to.
LEAVING = "leaving"
PHASES = (*STARTING, *TRAINING, LEAVING)
# Sent by Slurm before the time limit (--signal) and at preemption, by launchers and by people.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

_STATE = struct.Struct("=dqq")  # when the phase began (CLOCK_MONOTONIC), its number, the step
_FOLDER = struct.Struct("=H4000s")
_SIZE = mmap.PAGESIZE * 2


@dataclass(frozen=True)
class State:
    """A rank's phase.

    since: start of the phase, in seconds of CLOCK_MONOTONIC, which all processes of a machine share. step: counted
    from 1; 0 before the first.
    """

    since: float
    phase: str
    step: int


class Page:
    """Shared memory that a rank writes and its watchdog reads: phase, step, start of the phase, and run folder.

    A reader may see a new phase with the start time of the phase before it. This is harmless.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE)

    @classmethod
    def make(cls) -> Page:
        descriptor = os.memfd_create("lowrank_dist")
        os.ftruncate(descriptor, _SIZE)
        return cls(descriptor)

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)

    def enter(self, phase: str, step: int) -> None:
        _STATE.pack_into(self._memory, 0, time.monotonic(), PHASES.index(phase), step)

    def state(self) -> State:
        since, phase, step = _STATE.unpack_from(self._memory, 0)
        return State(since, PHASES[phase], step)

    def set_folder(self, path: str) -> None:
        """Set the run folder, in which the watchdog records a failure. Before this there is none."""
        name = os.fsencode(path)
        _FOLDER.pack_into(self._memory, _STATE.size, len(name), name)

    def folder(self) -> str | None:
        length, name = _FOLDER.unpack_from(self._memory, _STATE.size)
        return os.fsdecode(name[:length]) if length else None


class StopRequest:
    """The request to stop a run: noted when a signal arrives, obeyed at the end of a step.

    Within this context the first of SIGNALS is stored; later ones change nothing.
    """

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
