"""Processes as Linux shows them under /proc; where there is no /proc there are none to see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# What the runner of `deepspeed` is called on its command line.
DEEPSPEED = ("deepspeed", "deepspeed.launcher.runner", "ds")

# Places in `stat_fields`; proc(5) numbers them from 1, with the process id and the name before.
STATE, USER_TICKS, SYSTEM_TICKS, STARTED, EXIT_CODE = (number - 3 for number in (3, 14, 15, 22, 52))


def ancestors() -> Iterator[Path]:
    """/proc/PID of this process's parent, of that one's parent, and so on."""
    process: Path | None = Path("/proc") / str(os.getppid())
    while process is not None and process.name != "0" and (process / "status").exists():
        yield process
        process = parent(process)


def parent(process: Path) -> Path | None:
    """/proc/PID of the parent; None where the process has ended."""
    try:
        status = (process / "status").read_text()
    except OSError:
        return None
    return process.parent / next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:"))


def words(process: Path) -> list[str]:
    """The command line of /proc/PID; empty where the process has ended."""
    try:
        return (process / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
    except OSError:
        return []


def stat_fields(process: Path) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty where the process has ended and its parent knows."""
    try:
        return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def started(process: Path) -> str:
    """When a process began, which tells it from a later one of the same number; "" where it has ended."""
    fields = stat_fields(process)
    return fields[STARTED] if runs(fields) else ""


def runs(fields: list[str]) -> bool:
    """Whether `stat_fields` are those of a process that has not ended."""
    return bool(fields) and fields[STATE] not in "ZX"
