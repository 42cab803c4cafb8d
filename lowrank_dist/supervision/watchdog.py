"""The watchdog of one rank: a process of its own, since what stops a rank stops its threads as well.

    python -m lowrank_dist.supervision.watchdog   (started by supervision.rank, never by hand)

It ends with its rank. Standard library alone: a rank's watchdog costs a few MB. It cannot be told to stop, for a
launcher that ends a job signals every process of it; that signal only tells it not to wait any longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowrank_dist.supervision.failure import Failure, record
from lowrank_dist.supervision.page import LEAVING, STARTING, Page, State

LOOK_SECONDS = 0.5
# Longer than a collective's own timeout, whose error says more than that a rank stood still.
GRACE_SECONDS = 10
# Between the signal that has the rank print its stacks, and the one that it cannot refuse.
STACKS_SECONDS = 3
LEAVE_SECONDS = 25
_ENDS_JOBS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


@dataclass(frozen=True)
class Charge:
    """What a watchdog is told at its start. timeout: that of the rank's collectives. launchers: process id → name.

    process, page and stacks are descriptors: of the rank's process, of `Page`, of what faulthandler writes.
    """

    pid: int
    process: int
    rank: int
    host: str
    timeout: float
    page: int
    stacks: int
    launchers: dict[str, str]


class Watchdog:
    """Looks at its rank until that has ended; says and records what it died of."""

    def __init__(self, charge: Charge) -> None:
        self._charge, self._page = charge, Page(charge.page)
        self._rank = charge.process
        self._launchers = dict(_opened(charge.launchers))
        self._poll = select.poll()
        for descriptor in (self._rank, *self._launchers):
            self._poll.register(descriptor, select.POLLIN)
        self._activity, self._active_since = 0, time.monotonic()
        self._oom_kills = _oom_kills()
        self._told_at: float | None = None

    def run(self) -> None:
        """Until the rank has ended."""
        while True:
            ready = {descriptor for descriptor, _ in self._poll.poll(1000 * LOOK_SECONDS)}
            state, code = self._page.state(), _exit_code(self._charge.pid)
            if self._rank in ready:
                self._ended(state, code)
                return
            for descriptor in ready & self._launchers.keys():
                self._launcher_gone(descriptor, state)
            if self._told_at is None and signal.sigpending() & _ENDS_JOBS:
                self._told_at = time.monotonic()
            reason = self._why_end_it(state)
            if reason is not None:
                self._end_it(state, reason)
                return

    def _why_end_it(self, state: State) -> str | None:
        """What is wrong with a rank that is still there, None while nothing is."""
        now = time.monotonic()
        still = now - (self._last_activity(now) if state.phase in STARTING else state.since)
        limit = self._charge.timeout + GRACE_SECONDS
        if state.phase == LEAVING:
            return "it did not end" if still > LEAVE_SECONDS else None
        if still > limit or (self._told_at is not None and still > limit / 2):
            stopped = " (its process is stopped)" if _process_state(self._charge.pid) in "Tt" else ""
            return f"stood still for {still:.0f} s{stopped}"
        if self._told_at is not None and now - self._told_at > max(limit, LEAVE_SECONDS):
            return "did not end when it was told to"
        return None

    def _last_activity(self, now: float) -> float:
        """When the rank was last seen to compute or to read."""
        activity = _activity(self._charge.pid)
        if activity != self._activity:
            self._activity, self._active_since = activity, now
        return self._active_since

    def _launcher_gone(self, descriptor: int, state: State) -> None:
        """The rank may outlive its launcher by a step and a checkpoint, which it is asked for."""
        name = self._launchers.pop(descriptor)
        self._poll.unregister(descriptor)
        if state.phase == LEAVING:
            return
        self._say(state, f"its launcher ({name}) is gone; it is told to save and stop", first=True)
        self._told_at = self._told_at or time.monotonic()
        _signal(self._charge.pid, signal.SIGTERM)

    def _end_it(self, state: State, reason: str) -> None:
        pid = self._charge.pid
        # faulthandler answers SIGABRT with the stacks of all threads, whoever holds the interpreter's lock.
        for number in (signal.SIGABRT, signal.SIGCONT):
            _signal(pid, number)
        self._poll_rank(STACKS_SECONDS)
        _signal(pid, signal.SIGKILL)
        self._poll_rank(STACKS_SECONDS)
        if state.phase != LEAVING:
            self._say(state, f"{reason} and was killed by its watchdog", first=True)

    def _poll_rank(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._rank, select.POLLIN)
        poll.poll(1000 * seconds)

    def _ended(self, state: State, code: int | None) -> None:
        if state.phase == LEAVING:
            return
        how = "it ended without a word" if code is None else f"it ended with {_describe(code)}"
        if _oom_kills() > self._oom_kills:
            how += "; the kernel's out-of-memory killer struck on this host meanwhile"
        # Ended by others: by its launcher, or by NCCL once a collective had taken too long.
        casualty = self._told_at is not None or signal.sigpending() & _ENDS_JOBS
        waited = state.phase not in STARTING and time.monotonic() - state.since > 0.9 * self._charge.timeout
        self._say(state, how, first=not (casualty or waited))

    def _say(self, state: State, reason: str, *, first: bool) -> None:
        failure = Failure(self._charge.rank, self._charge.host, state.step, state.phase, reason, self._stacks(), first)
        folder = self._page.folder()
        if folder is not None:
            record(Path(folder), failure)
        if first:
            print(f"lowrank_dist: {failure}", file=sys.stderr, flush=True)

    def _stacks(self) -> str:
        """What faulthandler wrote of the rank's threads before it died."""
        size = os.fstat(self._charge.stacks).st_size
        return os.pread(self._charge.stacks, min(size, 20_000), 0).decode(errors="replace")


def _opened(launchers: dict[str, str]) -> Iterator[tuple[int, str]]:
    for pid, name in launchers.items():
        with contextlib.suppress(ProcessLookupError):
            yield os.pidfd_open(int(pid)), name


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; empty once the process is gone."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _process_state(pid: int) -> str:
    return (_stat(pid) or ["?"])[0]


def _exit_code(pid: int) -> int | None:
    """A wait status, while the process has ended and its parent has not asked yet."""
    fields = _stat(pid)
    return int(fields[49]) if fields and fields[0] == "Z" else None


def _describe(status: int) -> str:
    number = status & 0x7F
    return f"signal {number} ({signal.Signals(number).name})" if number else f"code {status >> 8}"


def _activity(pid: int) -> int:
    """Grows while the process computes or reads."""
    fields = _stat(pid)
    ticks = int(fields[11]) + int(fields[12]) if fields else 0
    try:
        lines = Path("/proc", str(pid), "io").read_text().splitlines()
    except OSError:
        return ticks
    return ticks + int(lines[0].split()[1])


def _oom_kills() -> int:
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


if __name__ == "__main__":
    Watchdog(Charge(**json.loads(sys.argv[1]))).run()
