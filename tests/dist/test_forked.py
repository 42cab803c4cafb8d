"""Faults of forked ranks and programs are reported, and forks share with their server what tests/forked.py says."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.dist.ranks import World
from tests.integration.launching import ROOT, Outcome, assert_codes
from tests.integration.launching import program as launched

pytestmark = pytest.mark.skipif(forked.DEVICE != "cpu", reason="ranks on a GPU are not forked")


@pytest.fixture
def world() -> Iterator[World]:
    """Two ranks that no other test uses."""
    started = World(2)
    yield started
    started.close()


def befall(kind: str, victim: int) -> int:
    """Inside a rank: cause the fault on the rank `victim` alone."""
    import torch.distributed as dist

    if dist.get_rank() == victim:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        {
            "raise": lambda: (_ for _ in ()).throw(RuntimeError("planted")),
            "segfault": lambda: ctypes.string_at(0),
            "exit": lambda: os._exit(3),
            "hang": lambda: time.sleep(600),
            "nothing": lambda: None,
        }[kind]()
    return dist.get_rank()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("raise", r"(?s)rank 1 of 2:\nTraceback.*in befall.*RuntimeError: planted"),
        ("segfault", r"rank 1 of 2:\nkilled by signal 11 \(Segmentation fault\)"),
        ("exit", r"rank 1 of 2:\nended with code 3"),
        ("hang", r"ranks \[1\] hang"),
    ],
)
def test_what_befalls_a_rank_fails_the_test(world: World, kind: str, said: str) -> None:
    assert world.run(befall, ("nothing", 1)) == [0, 1]
    with pytest.raises(AssertionError, match=said):
        world.run(befall, (kind, 1), seconds=2)


def test_a_rank_that_is_killed_between_two_calls_is_named(world: World) -> None:
    world.run(befall, ("nothing", 1))
    world.processes[1].kill()
    world.processes[1].join()
    with pytest.raises(AssertionError, match=r"rank 1 of 2:\nkilled by signal 9"):
        world.run(befall, ("nothing", 1))


def test_ranks_that_wait_for_one_whose_program_failed_end_with_its_words(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forked, "AFTER_A_FAILURE", 1.0)
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[1\] hang, rank 0 ended with code 3:\nplanted"):
        world.run(one_fails, ())
    assert time.monotonic() - began < 60


def one_fails() -> Outcome:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        time.sleep(600)
    return Outcome(3, "", "planted")


def test_codes_that_differ_are_shown_with_what_was_said() -> None:
    assert_codes([Outcome(0, "", ""), Outcome(0, "", "")], 0)
    with pytest.raises(AssertionError, match=r"rank 1, code 3:\nplanted"):
        assert_codes([Outcome(0, "", ""), Outcome(3, "", "planted")], 0)


def test_a_collective_without_its_peer_ends(world: World) -> None:
    """A dead rank is reported by what killed it, or by the peer that misses it; the call never hangs."""
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank [01] of 2:\n(Traceback|killed by signal 11)"):
        world.run(die_in_a_collective, ())
    assert time.monotonic() - began < 30


def die_in_a_collective() -> None:
    import torch
    import torch.distributed as dist

    if dist.get_rank() == 1:
        befall("segfault", 1)
    dist.all_reduce(torch.ones(1))


def surroundings() -> dict[str, Any]:
    """Inside a rank: return the state that it shares, or does not share, with its server."""
    import torch

    status = Path("/proc/self/status").read_text().splitlines()
    return {
        "pid": os.getpid(),
        "loaded": forked.PRELOADED in sys.modules,
        "threads": torch.get_num_threads(),
        "peak": next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")),
        "now": next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")),
    }


def test_a_rank_is_a_process_of_its_own_with_one_thread_and_a_peak_of_its_own() -> None:
    (loaded,) = call(spend, 300)
    assert loaded["peak"] > loaded["now"] + 250_000, "the peak does not count what was freed"
    (after,) = call(surroundings)
    assert after["peak"] < loaded["peak"] - 200_000, "the peak is another process's"
    assert after["loaded"] and after["threads"] == 1
    assert len({os.getpid(), loaded["pid"], after["pid"]}) == 3


def spend(mib: int) -> dict[str, Any]:
    held = b"x" * (mib << 20)
    del held
    return surroundings()


def call(function: Any, *arguments: Any) -> list[Any]:
    started = World(1)
    try:
        return started.run(function, arguments)
    finally:
        started.close()


PROGRAM = """
import atexit, os, subprocess, sys, time
kind, who = sys.argv[1], int(os.environ["WHO"])
print("argument", kind, who, os.environ.get("HOME"), os.getcwd(), flush=True)
print("an error", file=sys.stderr)
if kind == "import":
    print(sys.path, "tests.preloaded" in sys.modules)
    import tests.preloaded
if kind == "exit":
    atexit.register(print, "at the exit")
    sys.excepthook = lambda kind, error, traceback: print("hook", error, traceback.tb_lineno)
    raise ValueError("planted")
if kind == "bytes":
    os.write(1, b"caf\\xe9\\n")
if kind == "die":
    os.kill(os.getpid(), 9)
if kind == "child":
    print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
if kind in ("hang", "child") or kind == "one fails" and who == 0:
    time.sleep(600)
sys.exit(who)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("kind", ["word", "exit", "import", "bytes"])
def test_programs_are_what_a_new_interpreter_makes_of_them(program: Path, kind: str) -> None:
    """Output, exit codes, streams, imports and exit handlers of forked programs are those of a new interpreter."""
    environments = [{"WHO": "0"}, {"WHO": "3", "PYTHONPATH": "/nowhere"}]
    found = forked.run_programs([program, kind], environments, seconds=60)
    options = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "check": False}
    fresh = [
        subprocess.run([sys.executable, program, kind], env=environment, **options) for environment in environments
    ]
    assert found == [(done.returncode, done.stdout, done.stderr) for done in fresh]
    said, complained = {
        "word": ("", "an error\n"),
        "exit": ("hook planted 12\nat the exit\n", "an error\n"),
        "import": ("False\n", "No module named 'tests'\n"),
        "bytes": ("caf\N{REPLACEMENT CHARACTER}\n", "an error\n"),
    }[kind]
    assert found[1].code == (1 if kind in ("exit", "import") else 3)
    assert found[1].stdout.startswith(f"argument {kind} 3 None {os.getcwd()}\n") and found[1].stdout.endswith(said)
    assert found[1].stderr.endswith(complained)


def test_output_of_a_launcher_that_is_not_text_hides_nothing(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "3")
    assert (
        launched([sys.executable, program, "bytes"])[:2]
        == forked.run_programs([program, "bytes"], [{**os.environ}], seconds=60)[0][:2]
    )


def test_a_program_that_is_killed_or_hangs(program: Path) -> None:
    assert forked.run_programs([program, "die"], [{"WHO": "0"}], seconds=30)[0].code == -9
    began = time.monotonic()
    said = r"processes \[0\] of 1 run for more than 2 s\nprocess 0: did not end\nargument hang 0"
    with pytest.raises(TimeoutError, match=said):
        forked.run_programs([program, "hang"], [{"WHO": "0"}], seconds=2)
    assert time.monotonic() - began < 20


def test_one_that_fails_is_shown_though_another_waits_for_it(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "AFTER_A_FAILURE", 1.0)
    said = (
        r"(?s)\[0\] of 2 still run 1 s after.*process 0: did not end.*"
        r"process 1: ended with code 3\nargument one fails 3"
    )
    with pytest.raises(TimeoutError, match=said):
        forked.run_programs([program, "one fails"], [{"WHO": "0"}, {"WHO": "3"}], seconds=300)


def test_a_program_that_hangs_is_killed_with_its_children(program: Path) -> None:
    with pytest.raises(TimeoutError) as raised:
        forked.run_programs([program, "child"], [{"WHO": "0"}], seconds=2)
    child = int(str(raised.value).splitlines()[3])
    assert forked._dies(child, 20.0)


def draws_and_limits() -> tuple[float, int, tuple[int, int]]:
    import numpy as np

    umask = os.umask(0)
    return float(np.random.rand()), umask, resource.getrlimit(resource.RLIMIT_CORE)


def test_a_fork_draws_for_itself_and_has_its_starters_limits() -> None:
    """A fork has its own random state, and the resource limits of its starter, not of whoever started the server."""
    umask, core = os.umask(0o027), resource.getrlimit(resource.RLIMIT_CORE)
    os.umask(umask)
    wanted = (1, core[1]) if core[1] != 0 else core
    started = World(1)
    started.run(os.getpid, ())
    os.umask(0o027)
    resource.setrlimit(resource.RLIMIT_CORE, wanted)
    try:
        second = World(1)
    finally:
        os.umask(umask)
        resource.setrlimit(resource.RLIMIT_CORE, core)
    first, later = (world.run(draws_and_limits, ())[0] for world in (started, second))
    started.close()
    second.close()
    assert first[0] != later[0]
    assert first[1:] == (umask, core) and later[1:] == (0o027, wanted)


def test_a_module_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    """The server itself ignores the failed import: everything would run, with starts as slow as before."""
    code = (
        "from tests import forked\n"
        "if __name__ == '__main__':\n"
        "    forked.PRELOADED = 'tests.no_such_module'\n"
        "    print(forked.run_programs(['x.py'], [{}], seconds=60))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert "the fork server has not loaded tests.preloaded: " in done.stdout + done.stderr, done


LOST = """
import os, signal, time
from multiprocessing import forkserver
from pathlib import Path
from threading import Timer
from tests import forked
if __name__ == "__main__":
    forked.start_server()
    there = Path("there")
    def kill():
        while not there.exists():
            time.sleep(0.02)
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    Timer(0.1, kill).start()
    Path("hang.py").write_text("import pathlib, time; pathlib.Path('there').touch(); time.sleep(600)")
    try:
        forked.run_programs(["hang.py"], [{}], seconds=120)
    except RuntimeError as error:
        print(error)
"""


def owner(tmp_path: Path, code: str) -> subprocess.Popen[str]:
    """A process that starts ranks of its own, in `tmp_path`."""
    script = tmp_path / "owner.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, script], env=environment, cwd=tmp_path, **streams)


def test_a_dead_server_is_called_that(tmp_path: Path) -> None:
    said, _ = owner(tmp_path, LOST).communicate(timeout=120)
    assert "the fork server died\nprocess 0: lost with its fork server" in said


INTERRUPTED = """
import os, signal
from pathlib import Path
from tests import forked
from tests.dist.ranks import World
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
    world = World(1)
    print(*world.run(os.getpid, ()), flush=True)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.kill(int(os.environ['OWNER']), signal.SIGINT)"
    Path("deaf.py").write_text(f"import os, signal, time; {deaf}; time.sleep(600)")
    forked.run_programs(["deaf.py"], [{"OWNER": str(os.getpid())}], seconds=300)
"""


def test_an_interrupt_ends_programs_that_are_deaf_and_worlds_that_stand_still(tmp_path: Path) -> None:
    started = owner(tmp_path, INTERRUPTED)
    try:
        said, _ = started.communicate(timeout=120)
    finally:
        started.kill()
    assert "KeyboardInterrupt" in said and started.returncode == -signal.SIGINT
    assert forked._dies(int(said.split()[0]), 20.0)


OWNER = """
import os, signal, sys
from tests.dist import ranks
if __name__ == "__main__":
    world = ranks.World(2)
    world.run(os.getpid, ())
    print(*(process.pid for process in world.processes), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ranks_end_with_a_killed_owner_though_they_are_stopped(tmp_path: Path) -> None:
    started = owner(tmp_path, OWNER)
    said, _ = started.communicate(timeout=120)
    assert started.returncode == -9 and len(said.split()) == 2, said
    assert all(forked._dies(int(pid), 20.0) for pid in said.split())


def test_a_world_stands_still_between_two_calls(world: World) -> None:
    """Stopped ranks use no CPU time, and continue where they were."""
    first = world.run(surroundings, ())

    def seconds(pid: int) -> float:
        return sum(int(field) for field in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])

    def states() -> set[str]:
        return {Path(f"/proc/{one['pid']}/stat").read_text().rpartition(")")[2].split()[0] for one in first}

    end = time.monotonic() + 10
    while states() != {"T"} and time.monotonic() < end:  # a signal needs a moment to arrive
        time.sleep(0.01)
    assert states() == {"T"}
    used = [seconds(one["pid"]) for one in first]
    time.sleep(0.3)
    assert [seconds(one["pid"]) for one in first] == used
    assert [one["pid"] for one in world.run(surroundings, ())] == [one["pid"] for one in first]
