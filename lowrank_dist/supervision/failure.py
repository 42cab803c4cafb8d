"""RUN/FAILED: which rank went first, where, and why. One record a job; what follows from a failure gives way to it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_dist.formats.atomic import temporary_name
from lowrank_dist.terminal import shown

NAME = "FAILED"
_FIRST, _LEFT, _BY = " went first, ", " was left behind ", " by "
_SHOWN = 8  # ranks in a list of names


@dataclass(frozen=True)
class Failure:
    """The end of a rank and its reason.

    first: it can be the cause; else it only met the end of others, of which `silent` said nothing before they were gone
    ("rank 3 on h2").
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
        return shown("\n".join(part.rstrip() for part in (self.headline, self.traceback) if part))


def record(folder: Path, failure: Failure | str) -> str:
    """Write FAILED unless one that explains as much is there. Returns what FAILED says now; never raises.

    failure: of this rank, or what another said that went first.
    """
    target = folder / NAME
    temporary = temporary_name(target)
    text = str(failure)
    try:
        temporary.write_text(f"{text}\n", encoding="utf-8", errors="replace")
        try:
            os.link(temporary, target)
        except OSError:  # there is one, or a file system without hard links
            if _weight(read(folder)) < _weight(text):
                temporary.replace(target)
    except OSError as error:
        return f"{text}\n(and {target} could not be written: {error})"
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return read(folder) or text


def read(folder: Path) -> str | None:
    """Return what FAILED says, None where there is none to read."""
    try:
        return (folder / NAME).read_text(encoding="utf-8", errors="replace").rstrip()
    except OSError:
        return None


def explains(said: str | None) -> bool:
    """Return whether a record names a cause."""
    return _weight(said) == 3


def _weight(said: str | None) -> int:
    """Return how much a record explains: a cause more than who is missing, and that more than that somebody is."""
    if not said:
        return 0
    ours = said.partition(": ")[0]
    return 3 if _FIRST in ours else 2 if _BY in ours.partition(_LEFT)[2] else 1


def retire(folder: Path) -> None:
    """Rename a FAILED: before any rank of this job knows the folder, it is an earlier job's, whatever its date says."""
    target = folder / NAME
    with contextlib.suppress(OSError):
        when = time.strftime("%Y%m%dT%H%M%S", time.localtime(target.stat().st_mtime))
        target.replace(folder / f"{NAME}.{when}")
