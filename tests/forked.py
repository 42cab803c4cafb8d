"""Processes of the tests, forked from one that has imported what a rank imports: 0.03 s of CPU a start instead of 3.

The server is Python's own (multiprocessing's forkserver), one for each process that runs tests. What is forked shares
with its server, and so with all others, what a launcher's ranks have for themselves: the hash seed, and what libraries
read from the environment as they were imported (OMP_NUM_THREADS, DS_ACCELERATOR=cpu, TORCHDYNAMO_DISABLE, malloc's
settings). Tests that are about those, or about a launcher, start a process of their own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = "tests.preloaded"
DEVICE = os.environ.get("LOWRANK_DIST_TEST_DEVICE", "cpu")
_PR_SET_PDEATHSIG = 1
_RESET_PEAK = "5"  # for /proc/self/clear_refs: the peak of resident memory counts from now on


class Ended(NamedTuple):
    """How a forked program ended; a negative code is the signal that ended it."""

    code: int
    stdout: str
    stderr: str


def context(*, fresh: bool = False) -> BaseContext:
    """Return the context in which multiprocessing starts processes.

    fresh: each is a new interpreter, which reads this process's environment. On a GPU all are, for CUDA does not
    survive a fork.
    """
    if fresh or DEVICE != "cpu":
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload([PRELOADED])
    return multiprocessing.get_context("forkserver")


def start(target: Callable[..., None], *arguments: Any, fresh: bool = False) -> BaseProcess:
    """Run a module-level function in a process that ends with this one, however this one ends.

    fresh: as `context` says.
    """
    chosen = context(fresh=fresh)
    main = _forked if chosen.get_start_method() == "forkserver" else _bound
    process = chosen.Process(target=main, args=(target, *arguments), daemon=True)
    process.start()
    return process


def run_programs(
    command: Sequence[object], environments: Sequence[Mapping[str, str]], *, seconds: float
) -> list[Ended]:
    """Run a script, and what it is told, in this working directory, once for each environment and at the same time.

    Raises TimeoutError, with what they have said, where one has not ended after `seconds`; all are killed then.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place, str(number)) for number in range(len(environments))]
        for output in outputs:  # for a process that ends before it has any
            output.with_suffix(".out").touch()
            output.with_suffix(".err").touch()
        processes = [
            start(_program, words, dict(environment), os.getcwd(), str(output))
            for environment, output in zip(environments, outputs, strict=True)
        ]
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [number for number, process in enumerate(processes) if process.exitcode is None]
        for number in hanging:
            processes[number].kill()
            processes[number].join()
        ended = [
            Ended(process.exitcode, *(output.with_suffix(suffix).read_text() for suffix in (".out", ".err")))
            for process, output in zip(processes, outputs, strict=True)
        ]
    if hanging:
        said = "".join(f"\nprocess {number}:\n{ended[number].stdout}{ended[number].stderr}" for number in hanging)
        raise TimeoutError(f"processes {hanging} of {len(processes)} run for more than {seconds:.0f} s{said}")
    return ended


def _forked(target: Callable[..., None], *arguments: Any) -> None:
    if PRELOADED not in sys.modules:  # the server passes over a module that it cannot import
        raise ImportError(f"the fork server has not loaded {PRELOADED}: `python -c 'import {PRELOADED}'` says why")
    # The server lives for as long as anyone has this open, and ranks are to end with it.
    os.close(forkserver._forkserver._forkserver_alive_fd)
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    _bound(target, *arguments)


def _bound(target: Callable[..., None], *arguments: Any) -> None:
    """Call the function, in a process that the kernel kills once its parent is dead: the fork server, or the tests."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    target(*arguments)


def _program(words: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    """The whole life of one program: its streams, its environment, and the code that it ends with."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        opened = os.open(output + suffix, os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.path.insert(0, folder)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
