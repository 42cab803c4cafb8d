"""A page of memory that a rank and its watchdog share: where the rank is, and since when."""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass

# In order. Until training begins a rank is judged by whether it computes or reads at all: to load 175B takes as long
# as the disk needs. From then on every phase says when it began. The end: all ranks wait for one another once more.
STARTING = ("start", "meeting", "model", "data set", "optimiser state")
ENDING = "end"
TRAINING = ("data", "forward", "backward", "reduction", "optimiser", "evaluation", "checkpoint", ENDING)
# What is left to do before the process ends, well or not: it has said what there was to say, or is about to.
LEAVING = "leaving"
PHASES = (*STARTING, *TRAINING, LEAVING)

_STATE = struct.Struct("=dqq")  # when the phase began (CLOCK_MONOTONIC), its number, the step
_FOLDER = struct.Struct("=H4000s")
_SIZE = mmap.PAGESIZE * 2


@dataclass(frozen=True)
class State:
    """`since`: seconds of CLOCK_MONOTONIC, which all processes of a machine share. step counts from 1, 0: before."""

    since: float
    phase: str
    step: int


class Page:
    """One writer, one reader; a reader may see a phase with the time of the one before, which does no harm."""

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
        """The run folder, where a record of failure belongs; none before it is set."""
        name = os.fsencode(path)
        _FOLDER.pack_into(self._memory, _STATE.size, len(name), name)

    def folder(self) -> str | None:
        length, name = _FOLDER.unpack_from(self._memory, _STATE.size)
        return os.fsdecode(name[:length]) if length else None
