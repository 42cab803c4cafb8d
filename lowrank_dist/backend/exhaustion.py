"""Limits that a rank has reached (open files, processes and threads, /dev/shm): their errors, with the remedy.

Needs only the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import traceback
from collections.abc import Iterator
from pathlib import Path

from lowrank_dist.backend.limits import process_bounds
from lowrank_dist.backend.node import host_name
from lowrank_dist.errors import LimitError, UserError

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_REMEDY = "`mount -o remount,size=8g /dev/shm`, or start the container with --shm-size=8g (or --ipc=host)"
# The usual limit of a login. A rank has connections to the others of each of Megatron's groups, beside its data.
ENOUGH_FILES = 1024
# Modules of Python that start processes; elsewhere EAGAIN may be a file lock or a socket.
_STARTERS = ("subprocess.py", "popen_fork.py", "popen_forkserver.py", "popen_spawn_posix.py", "forkserver.py")
_FEW = 8
_SHOWN = 160  # characters of an error
_BEFORE = "before the launcher starts; srun passes on the limits of the shell that calls it"


@contextlib.contextmanager
def name_limits() -> Iterator[None]:
    """Raise LimitError, with the limit and the remedy, in place of an error of the block that a limit has caused."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = explain(error)
        if reason is None:
            raise
        raise LimitError(reason) from error


def explain(error: BaseException | None) -> str | None:
    """Return the limit that caused an error or one of its causes, and the remedy; None where no limit did."""
    while error is not None:
        reason = _explain(error)
        if reason is not None:
            return reason
        error = error.__cause__ or error.__context__
    return None


def _explain(error: BaseException) -> str | None:
    code = error.errno if isinstance(error, OSError) else None
    # Libraries in C++ raise RuntimeErrors with the system's message.
    text = str(error).strip() if isinstance(error, (OSError, RuntimeError)) else ""
    here = f"on {host_name()} ({text.partition(chr(10))[0][:_SHOWN]})"
    if code == errno.ENFILE or "Too many open files in system" in text:
        return f"too many open files of all processes {here}; raise the sysctl fs.file-max there"
    # gloo cannot resolve its own address where it has no descriptor for that, and says no more.
    if code == errno.EMFILE or "Too many open files" in text or ("Cannot resolve" in text and not _can_open(_FEW)):
        return f"too many open files {here}: {open_files_remedy()}"
    starts = "can't start new thread" in text or (code == errno.EAGAIN and _starts_process(error))
    # std::thread, of which gloo starts three a group, says no more than the system's message.
    again = "Resource temporarily unavailable"
    if starts or (code is None and (text == again or (again in text and "thread" in text.lower()))):
        return f"no further process or thread can be started {here}: {_processes_remedy()}"
    full = code == errno.ENOSPC or "No space left on device" in text or "creating shared memory" in text
    if full and str(SHARED_MEMORY) in text:
        return f"{SHARED_MEMORY} is full or too small {here}; {SHARED_MEMORY_REMEDY}"
    return None


def require_files(number: int) -> None:
    """Raise LimitError unless this process can open `number` more files."""
    if not _can_open(number):
        raise LimitError(
            f"too many open files on {host_name()} (a rank needs {number} more to meet the others): "
            f"{open_files_remedy()}"
        )


def _can_open(number: int) -> bool:
    opened: list[int] = []
    try:
        for _ in range(number):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return False
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return True


def _starts_process(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(os.path.basename(frame.filename) in _STARTERS for frame in frames)


def open_files_remedy() -> str:
    """Return the limit on open files of this process, and how to raise it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"a process may have {soft} files and connections open (`ulimit -n`)"
    if soft < hard and (hard >= ENOUGH_FILES or hard == resource.RLIM_INFINITY):
        return f"{said}; run `ulimit -n {'unlimited' if hard == resource.RLIM_INFINITY else hard}` {_BEFORE}"
    return (
        f"{said}, and its hard limit is {hard}; raise nofile in /etc/security/limits.conf, LimitNOFILE of slurmd or "
        f"sshd, or --ulimit nofile=65536 of a container, {_BEFORE}"
    )


def _processes_remedy() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    own = "without a limit" if soft == resource.RLIM_INFINITY else f"{soft}"
    found = [f"processes and threads of this user: {own} (`ulimit -u`)"]
    found += [f"pids.max of {cgroup}: {limit}" for cgroup, limit in process_bounds()]
    return (
        f"{'; '.join(found)}; raise the limit that is reached "
        f"(`ulimit -u`, nproc in /etc/security/limits.conf, TasksMax of the service, --pids-limit of a container) "
        f"{_BEFORE}, or give each rank fewer threads by OMP_NUM_THREADS"
    )
