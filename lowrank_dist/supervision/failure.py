"""RUN/FAILED: the rank that failed first, where and why.

There is one record per job. The record of a cause replaces that of a rank which only lost its peers.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_dist.formats.atomic import temporary_name
from lowrank_dist.terminal import escape_control

NAME = "FAILED"
_FIRST, _LEFT, _BY = " failed first, ", " lost the other ranks ", ", no answer from "
_SHOWN = 8  # ranks in a list of names


@dataclass(frozen=True)
class Failure:
    """The end of a rank and its reason.

    first: this rank may be the cause; otherwise it only lost its peers. silent: the peers that ended without a message,
    as "rank 3 on h2".
    """

    rank: int
    host: str
    step: int
    phase: str
    reason: str
    traceback: str
    first: bool
    silent: Sequence[str] = ()

    @property
    def headline(self) -> str:
        where = f"at step {self.step} in {self.phase}" if self.step else f"before the first step, in {self.phase}"
        how = f"{_FIRST if self.first else _LEFT}{where}"
        if self.silent:
            more = f" and {len(self.silent) - _SHOWN} more" if len(self.silent) > _SHOWN else ""
            how += f"{_BY}{', '.join(self.silent[:_SHOWN])}{more}"
        return f"rank {self.rank} on {self.host}{how}: {self.reason}"

    def __str__(self) -> str:
        return escape_control("\n".join(part.rstrip() for part in (self.headline, self.traceback) if part))


def record(folder: Path, failure: Failure | str) -> str:
    """Write FAILED, unless an existing FAILED explains as much. Returns its text afterwards; never raises.

    failure: this rank's failure, or the text of the rank that failed first.
    """
    target = folder / NAME
    temporary = temporary_name(target)
    text = str(failure)
    try:
        temporary.write_text(f"{text}\n", encoding="utf-8", errors="replace")
        try:
            os.link(temporary, target)
        except OSError:  # FAILED exists already, or the file system has no hard links
            if _weight(read(folder)) < _weight(text):
                temporary.replace(target)
    except OSError as error:
        return f"{text}\n(and {target} could not be written: {error})"
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return read(folder) or text


def read(folder: Path) -> str | None:
    """Return the text of FAILED; None where there is none or it cannot be read."""
    try:
        return (folder / NAME).read_text(encoding="utf-8", errors="replace").rstrip()
    except OSError:
        return None


def explains(said: str | None) -> bool:
    """Return True for a record that names a cause."""
    return _weight(said) == 3


def _weight(said: str | None) -> int:
    """Return how much a record explains: 3 a cause, 2 the missing ranks, 1 only that a rank is missing, 0 no record."""
    if not said:
        return 0
    ours = said.partition(": ")[0]
    return 3 if _FIRST in ours else 2 if _BY in ours.partition(_LEFT)[2] else 1


def retire(folder: Path) -> None:
    """Rename FAILED, which an earlier job left, to FAILED.TIME. Call it before any rank of this job can write one."""
    target = folder / NAME
    with contextlib.suppress(OSError):
        when = time.strftime("%Y%m%dT%H%M%S", time.localtime(target.stat().st_mtime))
        target.replace(folder / f"{NAME}.{when}")
