"""Faults in file system calls below a folder: a SIGKILL at any of them, a full disk, operations that do not exist.

The process under test is started with `environment()`, which preloads shim.c, and arms it; `Zygote` does so for a
function, once per point, in milliseconds. Production code knows nothing of it. Linux on x86_64 or aarch64.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("shim.c")
_REPOSITORY = Path(__file__).parents[2]


class Action(enum.IntEnum):
    """The fault at the nth operation; values as in shim.c."""

    COUNT = 0
    # SIGKILL instead of the operation.
    KILL_BEFORE = 1
    # SIGKILL after the operation, or after half of it where it moves bytes.
    KILL_DURING = 2
    # The operation and every later one that needs space fail, but the first write still stores half of its bytes.
    NO_SPACE = 3
    # This operation alone fails, if it needs space.
    NO_SPACE_ONCE = 4


def build() -> Path:
    """Return the compiled shim, built at most once for its source. Raises RuntimeError without a C compiler."""
    key = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"lowrank_dist-faults-{os.getuid()}")
    library = folder / f"shim-{key}.so"
    if library.exists():
        return library
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("the fault injector needs a C compiler: install cc, gcc or clang")
    folder.mkdir(mode=0o700, exist_ok=True)
    # A fortified build would call other names than those that the shim defines.
    options = "-std=gnu11 -O1 -Wall -Wextra -U_FORTIFY_SOURCE -fPIC -shared".split()
    with tempfile.TemporaryDirectory(dir=folder) as made:
        command = [compiler, *options, "-o", f"{made}/shim.so", str(_SOURCE), "-ldl"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"the fault injector does not compile:\n{result.stderr}")
        os.rename(f"{made}/shim.so", library)
    return library


def environment() -> dict[str, str]:
    """Return this environment with the shim preloaded, and one thread: a process may then fork after using torch."""
    preload = " ".join(filter(None, [str(build()), os.environ.get("LD_PRELOAD", "")]))
    return {**os.environ, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1"}


def arm(root: Path, nth: int = 0, action: Action = Action.COUNT) -> None:
    """From now on count this process's operations below the existing folder `root`; the fault is at the nth, from 1.

    Raises OSError where the kernel allows no seccomp filter. The filter stays after `disarm`, without effect.
    """
    code = _shim().faults_arm(os.fsencode(os.path.abspath(root)), nth, int(action))
    if code != 0:
        raise OSError(code, f"could not arm the fault injector: {os.strerror(code)}", str(root))


def refuse(*kinds: str, code: int) -> None:
    """Let every operation of these kinds fail with the errno `code`, until the next `arm`: a poorer file system.

    kinds: as in `trace`; also fsync-folder, and lock.
    """
    if (failed := _shim().faults_refuse(" ".join(kinds).encode(), code)) != 0:
        raise OSError(failed, os.strerror(failed))


def disarm() -> int:
    """Stop counting. Returns the number of operations since `arm`."""
    return _shim().faults_disarm()


def count() -> int:
    return _shim().faults_count()


def trace() -> list[str]:
    """Return the operations since `arm` in order: "rename .out-tmp -> out", "write x (5 bytes)"; below the root."""
    size = _shim().faults_trace(None, 0)
    buffer = ctypes.create_string_buffer(size)
    _shim().faults_trace(buffer, size)
    # A thread that was killed may have left its line empty.
    lines = [line.partition(" ") for line in os.fsdecode(buffer.raw).replace("\0", "").splitlines()]
    numbered = {int(number): text for number, _, text in lines if number}
    return [numbered.get(number, "?") for number in range(1, max(numbered, default=0) + 1)]


def _shim() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    if not hasattr(library, "faults_arm"):
        raise RuntimeError("this process has no fault injector: start it with tests.faults.environment()")
    library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    library.faults_refuse.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.faults_trace.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.faults_trace.restype = ctypes.c_size_t
    library.faults_count.restype = library.faults_disarm.restype = ctypes.c_long
    return library


@dataclass(frozen=True)
class Outcome:
    """How one call of the function ended: killed, with an exception, or with a value."""

    killed: bool
    count: int
    trace: list[str]
    value: Any = None
    # "DiskError: could not …", the names of its class and bases, and its traceback.
    error: str | None = None
    classes: tuple[str, ...] = ()
    traceback: str = ""


class Zygote:
    """A process that has imported `function` ("package.module:name") and forks a child for every call of it.

    Arguments after the root folder, and the result, must be JSON values. The function may use torch: the module is
    imported with one thread, and the child forks before anything else of it runs. The function's output goes to stderr.
    """

    def __init__(self, function: str, timeout: float = 60) -> None:
        self._timeout = timeout
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", function],
            env=environment(),
            cwd=_REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, root: Path, *arguments: Any, nth: int = 0, action: Action = Action.COUNT) -> Outcome:
        """Call function(root, *arguments), armed.

        Raises AssertionError when it hangs or dies of anything but the fault.
        """
        command = {"root": str(root), "arguments": arguments, "nth": nth, "action": action, "timeout": self._timeout}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        # The first answer also waits for the imports.
        ready, _, _ = select.select([self._process.stdout], [], [], 2 * self._timeout)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self.close()
            raise AssertionError("the zygote hangs or is dead; its stderr says why")
        reply = json.loads(line)
        if "failure" in reply:
            raise AssertionError(f"{reply['failure']} at point {nth} ({action.name}): {reply['trace'][-1:]}")
        return Outcome(**{**reply, "classes": tuple(reply.get("classes", ()))})

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
