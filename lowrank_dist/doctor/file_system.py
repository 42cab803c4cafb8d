"""The operations that a run uses of its folder's file system, each tried once, and what a run does without it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowrank_dist.doctor.rows import Row
from lowrank_dist.formats.atomic import exchange_at_once, sync

WHAT = "file system"


@dataclass(frozen=True)
class Operation:
    """An operation of a file system.

    attempt: called with an empty folder; returns False, or raises OSError, where the operation does not work. without:
    the consequence. needed: a run is not safe without it.
    """

    name: str
    attempt: Callable[[Path], bool]
    without: str
    needed: bool = False


def _symbolic_link(folder: Path) -> bool:
    (folder / "link").symlink_to("target")
    return os.readlink(folder / "link") == "target"


def _hard_link(folder: Path) -> bool:
    (folder / "file").touch()
    os.link(folder / "file", folder / "link")
    return True


def _lock(folder: Path) -> bool:
    """Lock a file as a run locks the log of rank 0."""
    with (folder / "file").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


def _exchange(folder: Path) -> bool:
    for name in ("one", "other"):
        (folder / name).mkdir()
    return exchange_at_once(folder / "one", folder / "other")


def _sync_file(folder: Path) -> bool:
    (folder / "file").write_bytes(b"x")
    return sync(folder / "file")


def _replace(folder: Path) -> bool:
    for name in ("new", "old"):
        (folder / name).write_text(name)
    (folder / "new").replace(folder / "old")
    return (folder / "old").read_text() == "new" and not (folder / "new").exists()


def _append(folder: Path) -> bool:
    for _ in range(2):
        with (folder / "file").open("ab") as file:
            file.write(b"x")
    return (folder / "file").read_bytes() == b"xx"


_UNSYNCED = "a power failure may cut off the newest checkpoint, and resuming takes the one before it"
OPERATIONS = (
    Operation(
        "replacing a file by a rename", _replace, "links, config.yaml and FAILED cannot be replaced", needed=True
    ),
    Operation("appending to a file", _append, "metrics.jsonl and the logs cannot be written", needed=True),
    Operation(
        "symbolic links",
        _symbolic_link,
        "checkpoints/last and best are files with the name of a checkpoint, which lowrank-dist follows and other "
        "programs do not",
    ),
    Operation("locks", _lock, "two runs in one folder are not noticed; start only one"),
    Operation(
        "exchange of two folders",
        _exchange,
        "a run that is killed in the moment in which adapter/ is replaced leaves it under a temporary name",
    ),
    Operation("fsync of files", _sync_file, _UNSYNCED),
    Operation("fsync of folders", sync, _UNSYNCED),
    Operation("hard links", _hard_link, "of two ranks that fail in the same moment, FAILED may name the second"),
)


def probe_operations(place: Path, folder: Path) -> list[Row]:
    """Return a row on the operations that the file system of a folder has and lacks.

    place: the path to name. folder: an existing folder in it, in which each operation is tried in a folder of its own.
    """
    lacking = []
    for number, operation in enumerate(OPERATIONS):
        own = folder / f"operation-{number}"
        own.mkdir()
        try:
            works, reason = operation.attempt(own), ""
        except OSError as error:
            works, reason = False, f" ({error.strerror})"
        if not works:
            lacking.append((operation, reason))
    if not lacking:
        return [Row(WHAT, "ok", f"{place}: links, locks, renames and fsync work")]
    said = "; ".join(f"without {operation.name}{reason}: {operation.without}" for operation, reason in lacking)
    if any(operation.needed for operation, _ in lacking):
        return [Row(WHAT, "broken", f"{place}: {said}; a run is not safe here: set output.dir to another file system")]
    return [Row(WHAT, "warning", f"{place}: {said}")]
