"""The watchdog of one rank: a separate process, since whatever stops a rank stops its threads as well.

    python -m lowrank_dist.supervision.watchdog   (started by `start`, never by hand)

It ends with its rank. It needs only the standard library, so it costs a few MB. It blocks stop signals, because a
launcher that ends a job signals every process of it; such a signal only shortens the watchdog's waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lowrank_dist.backend.launchers import (
    EXIT_CODE,
    STARTED,
    STATE,
    SYSTEM_TICKS,
    USER_TICKS,
    Launcher,
    is_running,
    stat_fields,
)
from lowrank_dist.supervision.failure import Failure, record
from lowrank_dist.supervision.status import LEAVING, SIGNALS, STARTING, Page, State
from lowrank_dist.terminal import say

LOOK_SECONDS = 0.2
# Added to the collectives' timeout, so that a collective fails first: its error says more than "stood still".
GRACE_SECONDS = 10
# From SIGABRT, after which the rank prints its stacks, to SIGKILL.
STACKS_SECONDS = 3
LEAVE_SECONDS = 25
# Launchers send a signal before they kill. A rank that dies sooner than this after the signal had another cause.
ASKED_SECONDS = 2
# A watchdog that did not run for this long was suspended together with its rank, by Slurm or by a sleeping machine.
PAUSE_SECONDS = 5
_ENDS_JOBS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# The innermost frame of a thread that waits for other ranks.
_COLLECTIVE = r'.*\n  File ".*/(torch/distributed/.*|lowrank_dist/parallel/collectives\.py)"'
_EXTENSIONS = re.compile(r"^Extension modules: .*\n?", re.MULTILINE)


@dataclass(frozen=True)
class WatchedRank:
    """The facts about its rank that a watchdog is given at its start. timeout: that of collectives, in seconds.

    started, launchers: from `launchers.start_time` and `find_launchers`. thread: id of the main thread, as faulthandler
    prints it. page, stacks: file descriptors of the `Page` and of faulthandler's output.
    """

    pid: int
    started: str
    thread: int
    rank: int
    host: str
    timeout: float
    page: int
    stacks: int
    launchers: Sequence[Launcher]


def start(watched: WatchedRank) -> subprocess.Popen[bytes]:
    """Start a watchdog beside this process and return its process."""
    package = Path(__file__).parents[2]
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    # The child inherits these signals as blocked, so they stay pending and the watchdog survives signals to the job.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, *_ENDS_JOBS})
    try:
        return subprocess.Popen(
            # -P: a file in the working directory may have the name of a standard module.
            [sys.executable, "-P", "-m", "lowrank_dist.supervision.watchdog", json.dumps(asdict(watched))],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            pass_fds=(watched.page, watched.stacks),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Watchdog:
    """Watches its rank until it has ended; prints and records the cause of death."""

    def __init__(self, watched: WatchedRank) -> None:
        self._watched, self._page = watched, Page(watched.page)
        self._process = Path("/proc", str(watched.pid))
        self._launchers = list(watched.launchers)
        self._oom_kills = _oom_kills()
        self._looked_at = self._active_since = self._counts_from = time.monotonic()
        self._activity = 0
        self._told_at: float | None = None
        self._stopped_at: float | None = None

    def run(self) -> None:
        """Watch until the rank has ended."""
        while self._look():
            time.sleep(LOOK_SECONDS)

    def _look(self) -> bool:
        """Check the rank once. Returns False once there is nothing left to watch."""
        fields, now = stat_fields(self._process), time.monotonic()
        state = self._page.state()  # read after the process's status, so it is final for one that has ended
        if not self._runs(fields):
            self._ended(state, fields, now)
            return False
        if now - self._looked_at > PAUSE_SECONDS:
            self._counts_from, self._stopped_at = now, None
        self._looked_at = now
        self._note(fields, now)
        for launcher in [launcher for launcher in self._launchers if not launcher.is_alive()]:
            self._launchers.remove(launcher)
            self._launcher_gone(launcher, state, now)
        reason = self._why_end_it(state, now)
        if reason is not None:
            self._end_it(state, reason)
        return reason is None

    def _runs(self, fields: list[str]) -> bool:
        return is_running(fields) and fields[STARTED] == self._watched.started

    def _note(self, fields: list[str], now: float) -> None:
        activity = int(fields[USER_TICKS]) + int(fields[SYSTEM_TICKS]) + _bytes_read(self._process)
        if activity != self._activity:
            self._activity, self._active_since = activity, now
        if fields[STATE] != "T":  # "t" is a debugger's
            self._stopped_at = None
        elif self._stopped_at is None:
            self._stopped_at = now
        if self._told_at is None and signal.sigpending() & _ENDS_JOBS:
            self._told_at = now

    def _why_end_it(self, state: State, now: float) -> str | None:
        """Return the reason to kill a living rank; None while there is none."""
        since = self._active_since if state.phase in STARTING else state.since
        still, told, limit = now - max(since, self._counts_from), self._told_at, self._watched.timeout + GRACE_SECONDS
        if state.phase == LEAVING:
            return "did not end" if still > LEAVE_SECONDS else None
        # Before the collectives of the other ranks time out, so that those learn the cause.
        if self._stopped_at is not None and (told or now - self._stopped_at > self._watched.timeout / 2):
            return f"was stopped (SIGSTOP) {now - self._stopped_at:.0f} s ago"
        if still > limit or (told and still > limit / 2):
            return f"made no progress for {still:.0f} s"
        if told and now - told > max(limit, LEAVE_SECONDS):
            return f"was told to end {now - told:.0f} s ago and did not end"
        return None

    def _launcher_gone(self, launcher: Launcher, state: State, now: float) -> None:
        """Ask the rank to save and stop after its launcher died; it may live on for one step and one checkpoint."""
        if state.phase == LEAVING:
            return
        self._say(state, f"its launcher ({launcher.name}) is gone, so it was told to save and stop", first=True)
        self._told_at = self._told_at or now
        self._signal(signal.SIGTERM)

    def _end_it(self, state: State, reason: str) -> None:
        # On SIGABRT faulthandler prints the stacks of all threads, whichever holds the interpreter's lock. Core dumps
        # are disabled first: one would take minutes and fill a disk.
        with contextlib.suppress(OSError):
            resource.prlimit(self._watched.pid, resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGABRT, signal.SIGCONT):
            self._signal(number)
        self._await_end()
        self._signal(signal.SIGKILL)
        self._await_end()
        if state.phase == LEAVING:
            return
        # A rank that waits in a collective for others is not the cause.
        first = self._stopped_at is not None or not self._in_collective()
        where = "" if first else " in a collective"
        self._say(state, f"it {reason}{where}, and was killed by its watchdog", first=first)

    def _signal(self, number: signal.Signals) -> None:
        if self._runs(stat_fields(self._process)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._watched.pid, number)

    def _await_end(self) -> None:
        end = time.monotonic() + STACKS_SECONDS
        while self._runs(stat_fields(self._process)) and time.monotonic() < end:
            time.sleep(LOOK_SECONDS / 4)

    def _ended(self, state: State, fields: list[str], now: float) -> None:
        if state.phase == LEAVING:
            return
        stacks = self._stacks()
        if fields and fields[STATE] == "Z":
            how = f"it ended with {_describe(int(fields[EXIT_CODE]))}"
        else:
            how = "it crashed" if stacks else "it ended without a message, as after SIGKILL"
        if _oom_kills() > self._oom_kills:
            how += "; meanwhile the kernel's out-of-memory killer ended a process on this host"
        # Not the cause if it was killed by its launcher, or by NCCL, which aborts when a collective takes too long.
        asked = self._told_at is not None and now - self._told_at > ASKED_SECONDS
        waited = "Aborted" in stacks and now - state.since > 0.9 * self._watched.timeout
        self._say(state, how, first=not (asked or waited))

    def _say(self, state: State, reason: str, *, first: bool) -> None:
        failure = Failure(
            self._watched.rank, self._watched.host, state.step, state.phase, reason, self._stacks(), first
        )
        folder = self._page.folder()
        if folder is not None:
            record(Path(folder), failure)
        if first:
            with contextlib.suppress(OSError):  # the reader of stderr may be gone
                say(f"lowrank_dist: {failure}", err=True)

    def _stacks(self) -> str:
        """Return the stacks of the rank's threads that faulthandler wrote before it died."""
        size = os.fstat(self._watched.stacks).st_size
        text = os.pread(self._watched.stacks, min(size, 20_000), 0).decode(errors="replace")
        return _EXTENSIONS.sub("", text)

    def _in_collective(self) -> bool:
        thread = rf"^(Current thread|Thread) 0x{self._watched.thread:016x} "
        return re.search(thread + _COLLECTIVE, self._stacks(), re.MULTILINE) is not None


def _describe(status: int) -> str:
    number = status & 0x7F
    return f"signal {number} ({signal.strsignal(number)})" if number else f"code {status >> 8}"


def _bytes_read(process: Path) -> int:
    try:
        return int((process / "io").read_text().split()[1])
    except OSError:
        return 0


def _oom_kills() -> int:
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    Watchdog(WatchedRank(**{**told, "launchers": [Launcher(*launcher) for launcher in told["launchers"]]})).run()
