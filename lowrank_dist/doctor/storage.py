"""Checks of the run folder: it can be written as a checkpoint is, other nodes see it, and checkpoints fit its disk."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_dist.doctor.file_system import probe_operations
from lowrank_dist.doctor.inputs import checkpoint_bytes
from lowrank_dist.doctor.rows import Row, format_size
from lowrank_dist.errors import DiskError, UserError
from lowrank_dist.formats.atomic import UNSUPPORTED, atomic_folder, temporary_name

if TYPE_CHECKING:
    from lowrank_dist.config import Config

PROBE_BYTES = 2**20
# Bytes for logs, metrics and everything else that does not grow with the model.
ROOM = 64 * 2**20
# Time that a shared file system may take to show another node's file.
SEEN_SECONDS = 5
FILE = "probe"


class Probe:
    """A folder with one file, written into the run folder as a checkpoint is, for which other nodes look.

    It lies in the run folder or, where that does not exist yet, in its nearest existing parent; the run folder is not
    created for it. Its name marks it as temporary, so the next run in the folder removes it if it is left behind.
    """

    def __init__(self, run: Path) -> None:
        self.run = run.absolute()
        self.folder: Path | None = None
        self._content = secrets.token_bytes(32) * (PROBE_BYTES // 32)

    def write(self) -> list[Row]:
        """Write, fsync, rename, and read back; then try each operation of the file system that a run uses.

        Raises UserError (DiskError) where the disk refuses.
        """
        place = nearest_existing(self.run)
        self.folder = temporary_name(place / "doctor")
        start = time.monotonic()
        try:
            with atomic_folder(self.folder) as temporary:
                (temporary / FILE).write_bytes(self._content)
        except DiskError as error:  # its own message has the names of the probe, which mean nothing to the user
            cause = error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else cause
            remedy = "free some space, or set output.dir to a folder where you may write"
            if isinstance(cause, OSError) and cause.errno in UNSUPPORTED - {errno.EACCES}:
                remedy = "a run is not safe on this file system, so set output.dir to another one"
            raise DiskError(f"{place}: a checkpoint cannot be written ({reason}); {remedy}") from error
        seconds = time.monotonic() - start
        where = str(place) if place == self.run else f"{place}, the folder for {self.run}"
        if (self.folder / FILE).read_bytes() != self._content:
            detail = f"{where}: written data was read back changed; set output.dir to another disk"
            return [Row("run folder", "broken", detail)]
        detail = f"{where}: {format_size(PROBE_BYTES)} written, synced, renamed and read back in {seconds * 1e3:.0f} ms"
        rows = [Row("run folder", "ok", detail, figures={"write_seconds": seconds})]
        return rows + probe_operations(place, self.folder)

    @property
    def written(self) -> dict[str, str] | None:
        """The probe's path and first bytes, by which another node recognises it; None where writing failed."""
        if self.folder is None or not (self.folder / FILE).is_file():
            return None
        return {"path": str(self.folder / FILE), "mark": self._content[:32].hex()}

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def unseen_probes(probes: Mapping[str, Mapping[str, str]], seconds: float = SEEN_SECONDS) -> list[str]:
    """Return the nodes whose probe (`Probe.written`) this node does not see, with its content, within `seconds`."""
    end = time.monotonic() + seconds
    waiting = dict(probes)
    while waiting:
        waiting = {node: probe for node, probe in waiting.items() if not _sees(Path(probe["path"]), probe["mark"])}
        if time.monotonic() > end:
            break
        time.sleep(0.1 if waiting else 0)
    return list(waiting)


def _sees(path: Path, mark: str) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(mark) // 2).hex() == mark
    except OSError:
        return False


def nearest_existing(path: Path) -> Path:
    """Return the path itself or its nearest existing parent. Raises UserError where that is not a folder."""
    place = next(place for place in (path, *path.parents) if place.exists())
    if not place.is_dir():
        raise UserError(f"output.dir: {place} is a file; choose a folder")
    return place


def space(config: Config, writes: bool) -> list[Row]:
    """Return a row that compares the free disk of the run folder with the size of the checkpoints.

    writes: rank 0, the only rank that writes checkpoints, is on this node.
    """
    try:
        sizes = checkpoint_bytes(config) if writes else None
    except UserError:  # it has a row of its own
        sizes = None
    place = nearest_existing(config.output.dir.absolute())
    facts = os.statvfs(place)
    free = facts.f_bavail * facts.f_frsize
    said = f"{format_size(free)} free for {config.output.dir}"
    figures: dict[str, float] = {"free_bytes": free}
    if sizes is not None:
        one, final = sizes
        # The checkpoint that `best` points to always stays; a new one is complete before an old one is removed; the
        # adapter is exported at the end.
        best = max(1, config.output.keep_best) if config.data.eval is not None else 0
        kept = (config.output.keep_last or 1) + best + 1
        needed = kept * one + final + ROOM
        figures |= {"needed_bytes": needed, "checkpoint_bytes": one}
        said += f"; {kept} checkpoints of {format_size(one)} and the other files take {format_size(needed)}"
        if config.output.keep_last is None:
            said += " (output.keep_last is null, so every further one adds to it)"
    else:
        needed = ROOM
        said += f"; logs need {format_size(needed)}"
    if facts.f_favail == 0 and facts.f_files:
        detail = f"{said}, but no inode is left; remove files, or set output.dir to another disk"
        return [Row("free disk", "broken", detail, figures=figures)]
    if free < needed:
        detail = (
            f"{said}, which is too little; free some, keep fewer checkpoints (output.keep_last) or set output.dir to "
            "another disk"
        )
        return [Row("free disk", "broken", detail, figures=figures)]
    return [Row("free disk", "ok", said, figures=figures)]
