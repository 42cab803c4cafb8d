"""Processes of the tests, forked from a server that has a rank's imports loaded: a start takes 0.03 s of CPU, not 3.

The server is Python's own (multiprocessing's forkserver), one for each process that runs tests. What is forked shares
with its server, and so with all others, what a launcher's ranks have for themselves: the hash seed, and what libraries
read from the environment as they were imported (OMP_NUM_THREADS, DS_ACCELERATOR=cpu, TORCHDYNAMO_DISABLE, malloc's
settings). Tests that are about those, or about a launcher, start a process of their own. Under a launcher every rank
has another hash seed, so an order that depends on it is seen there.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

PRELOADED = "tests.preloaded"
DEVICE = os.environ.get("LOWRANK_DIST_TEST_DEVICE", "cpu")
# Seconds that the others have to end once one has failed: they might wait for it until a timeout of minutes.
AFTER_A_FAILURE = 20.0
_PR_SET_PDEATHSIG = 1
_RESET_PEAK = "5"  # written to /proc/self/clear_refs: from then on the peak of resident memory is counted anew
_LOST = 255  # multiprocessing's exit code of a process whose fork server died before it could report the real one
_servers: WeakKeyDictionary[BaseProcess, int] = WeakKeyDictionary()


class Outcome(NamedTuple):
    """How a program ended; a negative code is the signal that ended it."""

    code: int
    stdout: str
    stderr: str


class Inherited(NamedTuple):
    """The state that a process inherits. The fork server has that of the process that started it first."""

    umask: int
    limits: dict[int, tuple[int, int]]

    @classmethod
    def of_this_process(cls) -> Inherited:
        status = Path("/proc/self/status").read_text().splitlines()
        umask = next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
        kinds = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
        return cls(umask, {kind: resource.getrlimit(kind) for kind in kinds})

    def apply(self) -> None:
        os.umask(self.umask)
        for kind, limit in self.limits.items():
            if resource.getrlimit(kind) != limit:
                resource.setrlimit(kind, limit)


def context(*, fresh: bool = False) -> BaseContext:
    """Return the context in which multiprocessing starts processes.

    fresh: each is a new interpreter, which reads this process's environment. On a GPU all are, for CUDA does not
    survive a fork.
    """
    if fresh or DEVICE != "cpu":
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload([PRELOADED])
    return multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the fork server, where ranks are forked, without waiting for its imports.

    Call it at the beginning of a session: a server that a test starts keeps that test's directory and environment.
    """
    if context().get_start_method() == "forkserver":
        forkserver.ensure_running()


def start(target: Callable[..., None], *arguments: Any, fresh: bool = False) -> BaseProcess:
    """Start a process that runs a module-level function and ends when this process ends, even by SIGKILL.

    fresh: as `context` says.
    """
    chosen = context(fresh=fresh)
    if chosen.get_start_method() != "forkserver":
        process = chosen.Process(target=_bound, args=(target, *arguments), daemon=True)
        process.start()
        return process
    inherited = Inherited.of_this_process()
    process = chosen.Process(target=_forked, args=(inherited, target, *arguments), daemon=True)
    process.start()
    _servers[process] = forkserver._forkserver._forkserver_pid
    return process


def how_it_ended(process: BaseProcess) -> str:
    """Describe what ended a process: its exit code, a signal, or the death of its fork server."""
    code = process.exitcode
    assert code is not None, "it runs"
    if code < 0:
        return f"killed by signal {-code} ({signal.strsignal(-code)})"
    server = _servers.get(process)
    if code == _LOST and server is not None and _dies(server):
        return f"lost with its fork server (process {server}), which died: out of memory? `dmesg` may say"
    return f"ended with code {code}"


def run_programs(
    command: Sequence[object], environments: Sequence[Mapping[str, str]], *, seconds: float
) -> list[Outcome]:
    """Run a script with its arguments in this working directory, once for each environment and all at the same time.

    Raises TimeoutError, with the output of all of them, where one has not ended after `seconds`, or AFTER_A_FAILURE
    seconds after another ended with an exit code; RuntimeError where one was lost with the fork server. None is left
    running.
    """
    words = [str(word) for word in command]
    processes: list[BaseProcess] = []
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place, str(number)) for number in range(len(environments))]
        for output in outputs:  # for a process that ends before it has a result
            output.with_suffix(".out").touch()
            output.with_suffix(".err").touch()
        try:
            for environment, output in zip(environments, outputs, strict=True):
                own = dict(environment), _path(words[0], environment.get("PYTHONPATH", ""))
                processes.append(start(_program, words, *own, os.getcwd(), str(output)))
            waited = _wait(processes, seconds)
            hanging = [number for number, process in enumerate(processes) if process.exitcode is None]
        finally:
            for process in processes:
                _end(process)
        ended = [
            Outcome(process.exitcode, *(_text(output.with_suffix(suffix)) for suffix in (".out", ".err")))
            for process, output in zip(processes, outputs, strict=True)
        ]
    ends = ["did not end" if number in hanging else how_it_ended(process) for number, process in enumerate(processes)]
    told = zip(ends, ended, strict=True)
    said = "".join(f"\nprocess {n}: {end}\n{one.stdout}{one.stderr}" for n, (end, one) in enumerate(told))
    if hanging:
        raise TimeoutError(f"processes {hanging} of {len(processes)} {waited}{said}")
    if any(end.startswith("lost") for end in ends):
        raise RuntimeError(f"the fork server died{said}")
    return ended


def _wait(processes: Sequence[BaseProcess], seconds: float) -> str:
    """Wait for all programs, for the time that `run_programs` allows. Returns that time in words."""
    end, waited = time.monotonic() + seconds, f"run for more than {seconds:.0f} s"
    failed = False
    while running := [process for process in processes if process.exitcode is None]:
        if not failed and any(process.exitcode for process in processes):
            failed = True
            if time.monotonic() + AFTER_A_FAILURE < end:
                end = time.monotonic() + AFTER_A_FAILURE
                waited = f"still run {AFTER_A_FAILURE:.0f} s after another failed"
        left = end - time.monotonic()
        if left <= 0:
            break
        connection.wait([process.sentinel for process in running], left)
    return waited


def _end(process: BaseProcess) -> None:
    """Kill a running program and all processes of its session."""
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):  # it has not called setsid yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _dies(pid: int, seconds: float = 1.0) -> bool:
    """Return whether a process is dead or exiting: it closes its files before the kernel reports it as dead."""
    end = time.monotonic() + seconds
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.01)


def _path(script: str, python_path: str) -> list[str]:
    """Return sys.path as `python SCRIPT` has it, without what pytest and the server add."""
    return [str(Path(script).resolve().parent), *filter(None, python_path.split(os.pathsep)), *_interpreters_path()]


@functools.cache
def _interpreters_path() -> list[str]:
    """Return the standard library, site-packages and the paths that .pth files add."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import json, sys; print(json.dumps(sys.path[1:]))"  # the first entry is that of `-c`
    return json.loads(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True))


def _forked(inherited: Inherited, target: Callable[..., None], *arguments: Any) -> None:
    if PRELOADED not in sys.modules:  # the server ignores a module that it cannot import
        raise ImportError(f"the fork server has not loaded {PRELOADED}: `python -c 'import {PRELOADED}'` says why")
    # The server lives as long as any process has this open, and ranks must end with it.
    os.close(forkserver._forkserver._forkserver_alive_fd)
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    inherited.apply()
    _reseed()
    _bound(target, *arguments)


def _reseed() -> None:
    """Draw the random state of a new interpreter. With the server's, the ranks could agree without communication."""
    import numpy as np

    random.seed()
    np.random.seed(int.from_bytes(os.urandom(4), "little"))


def _bound(target: Callable[..., None], *arguments: Any) -> None:
    """Call the function in a process that the kernel kills when its parent (the fork server or the tests) dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    target(*arguments)


def _program(words: list[str], environment: dict[str, str], path: list[str], folder: str, output: str) -> None:
    """Run one program as an interpreter would: streams, environment, imports, exit handlers."""
    os.setsid()  # so that its children can be killed with it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        opened = os.open(output + suffix, os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # a program that imports one of these fails as it would elsewhere
    sys.argv = words
    code: object = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        error = error.with_traceback(_below(error.__traceback__, words[0]))
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.exit(code)


def _below(traceback: TracebackType | None, script: str) -> TracebackType | None:
    """Return a traceback from its first frame in the script on; the whole traceback where no frame is in it."""
    part = traceback
    while part is not None and part.tb_frame.f_code.co_filename != script:
        part = part.tb_next
    return part or traceback
