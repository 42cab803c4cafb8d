"""What befalls a forked rank or program is reported, and what a fork has in common with others is what is said of it."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.dist.ranks import World
from tests.integration.launching import ROOT

pytestmark = pytest.mark.skipif(forked.DEVICE != "cpu", reason="ranks on a GPU are not forked")


@pytest.fixture
def world() -> Iterator[World]:
    """Two ranks that no other test uses."""
    started = World(2)
    yield started
    started.close()


def befall(kind: str, victim: int) -> int:
    """In a rank: nothing for all but one."""
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
        ("exit", r"rank 1 of 2:\nended with code 3 in the middle of a test"),
        ("hang", r"ranks \[1\] hang"),
    ],
)
def test_what_befalls_a_rank_fails_the_test(world: World, kind: str, said: str) -> None:
    assert world.run(befall, ("nothing", 1)) == [0, 1]
    with pytest.raises(AssertionError, match=said):
        world.run(befall, (kind, 1), seconds=2)


def test_a_collective_without_its_peer_ends(world: World) -> None:
    """A rank that dies is named by what it died of, or by the peer that misses it: never by a hang."""
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
    """In a rank: what it shares, or does not share, with its server."""
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
import os, sys, time
print("argument", sys.argv[1], os.environ["WHO"], os.environ.get("HOME"), os.getcwd(), flush=True)
print("an error", file=sys.stderr)
if sys.argv[1] == "hang":
    time.sleep(600)
if sys.argv[1] == "die":
    os.kill(os.getpid(), 9)
sys.exit(int(os.environ["WHO"]))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_programs_have_their_own_environment_output_and_code(program: Path) -> None:
    """As two new interpreters would: the same words, codes and streams."""
    environments = [{"WHO": "0"}, {"WHO": "3"}]
    found = forked.run_programs([program, "word"], environments, seconds=30)
    fresh = [
        subprocess.run([sys.executable, program, "word"], env=environment, capture_output=True, text=True, check=False)
        for environment in environments
    ]
    assert [tuple(ended) for ended in found] == [(done.returncode, done.stdout, done.stderr) for done in fresh]
    assert found[1] == (3, f"argument word 3 None {os.getcwd()}\n", "an error\n")


def test_a_program_that_is_killed_or_hangs(program: Path) -> None:
    assert forked.run_programs([program, "die"], [{"WHO": "0"}], seconds=30)[0].code == -9
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"processes \[0\] of 1 run for more than 2 s\nprocess 0:\nargument hang 0"):
        forked.run_programs([program, "hang"], [{"WHO": "0"}], seconds=2)
    assert time.monotonic() - began < 20


def test_a_module_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    """The server itself passes over it: everything would run, and start as slowly as before."""
    code = (
        "from tests import forked\n"
        "if __name__ == '__main__':\n"
        "    forked.PRELOADED = 'tests.no_such_module'\n"
        "    print(forked.run_programs(['x.py'], [{}], seconds=60))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "the fork server has not loaded tests.preloaded: " in done.stdout + done.stderr, done


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
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == -9 and len(done.stdout.split()) == 2, done
    end = time.monotonic() + 10
    while (left := [pid for pid in done.stdout.split() if Path("/proc", pid).exists()]) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == []


def test_a_world_stands_still_between_two_calls(world: World) -> None:
    """Stopped ranks take no time of the processor, and go on where they were."""
    first = world.run(surroundings, ())

    def seconds(pid: int) -> float:
        return sum(int(field) for field in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])

    def states() -> set[str]:
        return {Path(f"/proc/{one['pid']}/stat").read_text().rpartition(")")[2].split()[0] for one in first}

    end = time.monotonic() + 10
    while states() != {"T"} and time.monotonic() < end:  # a signal takes its time
        time.sleep(0.01)
    assert states() == {"T"}
    used = [seconds(one["pid"]) for one in first]
    time.sleep(0.3)
    assert [seconds(one["pid"]) for one in first] == used
    assert [one["pid"] for one in world.run(surroundings, ())] == [one["pid"] for one in first]
