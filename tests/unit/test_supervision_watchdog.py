"""The watchdog on real processes: the processes it ends, when, and the causes it reports. Each test has its control."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from lowrank_dist.backend.launchers import Launcher, start_time
from lowrank_dist.supervision import watchdog
from lowrank_dist.supervision.status import LEAVING, Page
from lowrank_dist.supervision.watchdog import Watchdog, WatchedRank, start

pytestmark = pytest.mark.slow

# Short, so that the tests do not wait.
TIMEOUT, GRACE, STACKS, LEAVE, ASKED = 0.6, 0.4, 2, 0.8, 0.5
PROGRAM = """
import ctypes, faulthandler, os, signal, sys, threading, time
faulthandler.enable(int(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
{before}
print(threading.main_thread().ident, flush=True)
"""
SLEEP = "time.sleep(60)"
SPIN = "while True: pass"
# Deadlocks in C, holding the interpreter's lock and ignoring signals.
HOLD = "lock, libc = (ctypes.c_long * 16)(), ctypes.PyDLL(None); [libc.pthread_mutex_lock(lock) for _ in range(2)]"
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
LATER = "time.sleep(0.5); "


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LOOK": 0.05, "GRACE": GRACE, "STACKS": STACKS, "LEAVE": LEAVE, "ASKED": ASKED}.items():
        monkeypatch.setattr(watchdog, f"{name}_SECONDS", seconds)


class WatchedProcess:
    """A child process in place of a rank, which runs `code`, with the page that holds its phase.

    before: code that has run when the object is made.
    """

    def __init__(self, folder: Path, code: str, phase: str, before: str) -> None:
        self.folder, self.page = folder, Page.make()
        self.page.set_folder(str(folder))
        self._stacks = os.memfd_create("stacks")
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(before=before) + code, str(self._stacks), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[self._stacks],
            text=True,
        )
        self._thread = int(self.process.stdout.readline())
        self.page.enter(phase, 7)

    def watched(self, launchers: list[Launcher] | None = None, timeout: float = TIMEOUT) -> WatchedRank:
        return WatchedRank(
            pid=self.process.pid,
            started=start_time(Path("/proc", str(self.process.pid))),
            thread=self._thread,
            rank=3,
            host="here",
            timeout=timeout,
            page=self.page.descriptor,
            stacks=self._stacks,
            launchers=launchers or [],
        )

    def watch(self, launchers: list[Launcher] | None = None, timeout: float = TIMEOUT) -> float:
        """Run a watchdog until it has nothing more to do; return the seconds that it took."""
        began = time.monotonic()
        Watchdog(self.watched(launchers, timeout)).run()
        return time.monotonic() - began

    def said(self) -> str:
        record = self.folder / "FAILED"
        return record.read_text() if record.exists() else ""

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._stacks)
        self.page.close()


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Callable[..., WatchedProcess]]:
    wards: list[WatchedProcess] = []

    def make(code: str, phase: str = "forward", before: str = "") -> WatchedProcess:
        wards.append(WatchedProcess(tmp_path, code, phase, before))
        return wards[-1]

    yield make
    for made in wards:
        made.close()


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def launcher_of(process: subprocess.Popen[bytes]) -> Launcher:
    return Launcher(process.pid, start_time(Path("/proc", str(process.pid))), "torchrun")


FIRST = "rank 3 on here failed first, at step 7 in forward: "


@pytest.mark.parametrize(
    "code, reason",
    [
        (DIE, r"it ended with signal 9 \(Killed\)"),
        ("os._exit(3)", "it ended with code 3"),
        ("ctypes.string_at(0)", r"it ended with signal 11 \(Segmentation fault\)\nFatal Python error: Segm"),
        ("os.abort()", r"it ended with signal 6 \(Aborted\)\nFatal Python error: Aborted"),
    ],
)
def test_says_how_a_rank_ended(
    ward: Callable[..., WatchedProcess], capsys: pytest.CaptureFixture[str], code: str, reason: str
) -> None:
    rank = ward(LATER + code)
    rank.watch(timeout=60)  # far off: an abort shortly before the timeout is taken for NCCL's
    assert re.match(FIRST + reason, rank.said()), rank.said()
    assert capsys.readouterr().err == f"lowrank_dist: {rank.said()}"


def test_says_nothing_of_a_rank_that_leaves(
    ward: Callable[..., WatchedProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    rank = ward(LATER + DIE, phase=LEAVING)
    rank.watch()
    assert rank.said() == "" and capsys.readouterr().err == ""


def test_a_rank_whose_end_its_parent_knows_already(ward: Callable[..., WatchedProcess]) -> None:
    rank = ward(SLEEP)
    watched = rank.watched()
    rank.process.kill()
    rank.process.wait()
    Watchdog(watched).run()
    assert rank.said() == f"{FIRST}it ended without a message, as after SIGKILL\n"


def test_another_process_of_the_same_number_is_not_the_rank(ward: Callable[..., WatchedProcess]) -> None:
    rank = ward(SLEEP)
    later = WatchedRank(**{**vars(rank.watched()), "started": "1"})
    Watchdog(later).run()
    assert rank.process.poll() is None, "a process was ended that is not the rank"


@pytest.mark.parametrize("code", [SLEEP, HOLD, SPIN])
def test_ends_a_rank_that_stands_still(ward: Callable[..., WatchedProcess], code: str) -> None:
    """The stack is dumped in C, whichever thread holds the interpreter's lock."""
    rank = ward(f"def hangs():\n    {code}\nhangs()")
    seconds = rank.watch()
    assert TIMEOUT + GRACE < seconds < TIMEOUT + GRACE + STACKS + 2
    assert re.match(FIRST + r"it made no progress for \d+ s, and was killed by its watchdog\nFatal Python", rank.said())
    assert "in hangs" in rank.said()
    assert rank.process.wait() == -signal.SIGABRT


def test_leaves_a_rank_alone_that_goes_on(ward: Callable[..., WatchedProcess]) -> None:
    rank = ward(SLEEP)

    def go_on() -> None:
        for _ in range(20):
            rank.page.enter("forward", 7)
            time.sleep(0.1)
        rank.page.enter(LEAVING, 7)
        rank.process.kill()

    going = threading.Thread(target=go_on)
    going.start()
    rank.watch()
    going.join()
    assert rank.said() == ""


def test_a_rank_that_starts_is_judged_by_its_work(ward: Callable[..., WatchedProcess]) -> None:
    works = ward("end = time.monotonic() + 2.5\nwhile time.monotonic() < end: pass\nos._exit(3)", phase="model")
    works.watch()
    assert "in model: it ended with code 3" in works.said()
    (works.folder / "FAILED").unlink()
    idle = ward(SLEEP, phase="model")
    assert idle.watch() > TIMEOUT + GRACE
    assert "in model: it made no progress" in idle.said()


def test_ends_a_stopped_rank_before_the_others_run_out_of_time(ward: Callable[..., WatchedProcess]) -> None:
    rank = ward(SPIN)
    rank.process.send_signal(signal.SIGSTOP)
    assert rank.watch() < TIMEOUT + GRACE
    assert rank.said().startswith(f"{FIRST}it was stopped (SIGSTOP) 0 s ago, and was killed by its watchdog\nFatal")


def test_a_rank_that_was_stopped_for_a_moment(ward: Callable[..., WatchedProcess]) -> None:
    rank = ward(LATER + "os._exit(3)")
    rank.process.send_signal(signal.SIGSTOP)
    go_on = threading.Timer(TIMEOUT / 4, rank.process.send_signal, [signal.SIGCONT])
    go_on.start()
    rank.watch()
    go_on.join()
    assert rank.said() == f"{FIRST}it ended with code 3\n"


def test_a_rank_that_waits_for_others_did_not_go_first(ward: Callable[..., WatchedProcess], tmp_path: Path) -> None:
    """Its innermost frame shows that it waits, like that of a rank in a torch collective."""
    module = tmp_path / "torch" / "distributed" / "collective.py"
    module.parent.mkdir(parents=True)
    module.write_text("import time\ndef all_reduce():\n    time.sleep(60)\n")
    code = "sys.path.insert(0, sys.argv[2] + '/torch/distributed')\nimport collective\ncollective.all_reduce()"
    waits = ward(code)
    waits.watch()
    assert waits.said().startswith("rank 3 on here lost the other ranks at step 7 in forward: it made no progress"), (
        waits.said()
    )
    # A rank stopped there is the first: the others wait for it.
    stopped = ward(LATER + code)
    time.sleep(1)
    stopped.process.send_signal(signal.SIGSTOP)
    stopped.watch()
    assert stopped.said().startswith(f"{FIRST}it was stopped"), stopped.said()


def test_an_abort_after_the_timeout_is_of_a_collective(ward: Callable[..., WatchedProcess]) -> None:
    """NCCL aborts this way. The control is the earlier abort in the test above."""
    rank = ward("time.sleep(0.75); os.abort()")
    rank.watch()
    assert rank.said().startswith("rank 3 on here lost the other ranks at step 7 in forward: it ended with signal 6")


@pytest.fixture
def send_blocked_sigterm() -> Iterator[Callable[[], None]]:
    """Block SIGTERM, as in a watchdog; yield a function that sends it to this thread: others may not block it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    while signal.sigpending():
        signal.sigwait({signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("delay, first", [(0.1, True), (ASKED + 0.3, False)])
def test_a_rank_that_dies_after_it_was_asked_to_end(
    ward: Callable[..., WatchedProcess], send_blocked_sigterm: Callable[[], None], delay: float, first: bool
) -> None:
    """A launcher asks, waits and kills. A rank that dies at once died of something else, which had the others asked."""
    rank = ward(SLEEP)

    def end() -> None:
        send_blocked_sigterm()
        time.sleep(delay)
        rank.process.kill()

    with mock.patch.object(watchdog, "GRACE_SECONDS", 60):
        ending = threading.Thread(target=end)
        ending.start()
        rank.watch()
        ending.join()
    assert ("failed first" in rank.said()) is first, rank.said()


def test_a_stopped_rank_that_is_asked_to_end(
    ward: Callable[..., WatchedProcess], send_blocked_sigterm: Callable[[], None]
) -> None:
    rank = ward(SPIN)
    rank.process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    send_blocked_sigterm()
    with mock.patch.object(watchdog, "GRACE_SECONDS", 60):
        watched = WatchedRank(**{**vars(rank.watched()), "timeout": 60})
        Watchdog(watched).run()
    assert rank.said().startswith(f"{FIRST}it was stopped")


OBEYS = "signal.signal(signal.SIGTERM, lambda *_: os._exit(85))"
REFUSES = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def test_a_rank_without_its_launcher_is_told_to_stop(
    ward: Callable[..., WatchedProcess], launcher: subprocess.Popen[bytes]
) -> None:
    rank = ward(SLEEP, before=OBEYS)
    kill = threading.Timer(0.3, launcher.kill)
    kill.start()
    rank.watch([launcher_of(launcher)])
    assert rank.process.wait() == 85
    assert rank.said() == f"{FIRST}its launcher (torchrun) is gone, so it was told to save and stop\n"


def test_a_rank_with_its_launcher_is_not(
    ward: Callable[..., WatchedProcess], launcher: subprocess.Popen[bytes]
) -> None:
    rank = ward("time.sleep(0.5); os._exit(3)", before=OBEYS)
    rank.watch([launcher_of(launcher)])
    assert rank.said() == f"{FIRST}it ended with code 3\n"


def test_a_launcher_that_was_gone_before_the_rank_could_see_it(ward: Callable[..., WatchedProcess]) -> None:
    rank = ward(SLEEP, before=OBEYS)
    rank.watch([Launcher(0, "", "torchrun")])
    assert rank.process.wait() == 85 and "its launcher (torchrun) is gone" in rank.said()


def test_a_rank_that_does_not_stop_without_its_launcher_is_killed(ward: Callable[..., WatchedProcess]) -> None:
    rank = ward(SLEEP, before=REFUSES)
    assert rank.watch([Launcher(0, "", "torchrun")]) < TIMEOUT + GRACE + STACKS
    assert rank.process.wait() == -signal.SIGABRT


def test_ends_a_rank_that_does_not_leave(ward: Callable[..., WatchedProcess]) -> None:
    rank = ward(SLEEP, phase=LEAVING)
    assert LEAVE < rank.watch() < LEAVE + STACKS
    assert rank.process.wait() == -signal.SIGABRT and rank.said() == ""


def test_a_job_that_was_suspended_is_not_hung(ward: Callable[..., WatchedProcess]) -> None:
    """Slurm's suspend stops the watchdog too: the time that it did not see does not count."""
    rank = ward(SLEEP)
    suspended, awake = Watchdog(rank.watched()), Watchdog(rank.watched())
    time.sleep(TIMEOUT + GRACE + 0.1)
    suspended._looked_at -= watchdog.PAUSE_SECONDS + 1
    assert suspended._look(), "ended for the time in which it was suspended"
    assert rank.process.poll() is None
    assert not awake._look() and rank.process.wait() == -signal.SIGABRT


def test_outlives_every_signal_to_the_job_but_not_its_rank(ward: Callable[..., WatchedProcess]) -> None:
    rank = ward(SLEEP)
    guard = start(rank.watched())
    status = Path("/proc", str(guard.pid), "status")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        guard.send_signal(number)
    time.sleep(0.3)
    assert guard.poll() is None and "SigPnd" in status.read_text()
    assert os.readlink(f"/proc/{guard.pid}/fd/1") == "/dev/null", "it holds open what the launcher reads"
    rank.page.enter(LEAVING, 7)
    rank.process.kill()
    assert guard.wait(timeout=20) == 0


def test_imports_the_standard_library_alone() -> None:
    code = "import sys, lowrank_dist.supervision.watchdog; print({'torch', 'numpy', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
