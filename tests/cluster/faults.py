"""Faults planted in the ranks of a run (faulty/sitecustomize.py), and how a job ends after one."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.rig import SELDOM, Rig, settled
from tests.cluster.runs import ENVIRONMENT, Job, write_job

CODE = Path(__file__).with_name("faulty")
TIMEOUT = 15
# Seconds beyond the timeout in which a job must end.
BEYOND = 30
MEMORY_MIB = 64
OVERRIDES = [f"engine.timeout_seconds={TIMEOUT}", "output.save_every=1"]
CURVES = dict[str, list[float]]


@dataclass(frozen=True)
class Faults:
    """The faults of a run, as "KIND:RANK:STEP,…". folder: that of its gate files."""

    planted: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **ENVIRONMENT,
            "FAULTS": self.planted,
            "FAULT_FOLDER": str(self.folder),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")])),
        }

    def await_gate(self, step: int, said: Callable[[], object]) -> None:
        """Wait until a rank stands at the gate of a step. `said` gives the output to show if none does."""
        assert settled((self.folder / f"{step}.reached").exists, True), said()

    def open_gate(self, step: int, *, once: Path | None = None) -> None:
        """Let the rank continue, after the file `once` exists if it is given."""
        assert once is None or settled(once.exists, True), f"there is no {once}"
        (self.folder / f"{step}.open").touch()


def submit(rig: Rig, config: Path, run: Path, environment: dict[str, str]) -> Job:
    """Submit a job of the run on both hosts, with the same script each time."""
    script = run.with_name("job.sbatch")
    if not script.exists():
        write_job(config, script, f"output.dir={run}", *OVERRIDES)
    return Job.submit(rig, script, environment)


@contextmanager
def small_cgroup(folder: Path) -> Iterator[None]:
    """Create a memory cgroup, linked as folder/cgroup; a process in it may take MEMORY_MIB more than it has."""
    first = Path("/sys/fs/cgroup/memory")
    hierarchy, limit = (first, "memory.limit_in_bytes") if first.exists() else (first.parent, "memory.max")
    cgroup = hierarchy / f"lowrank_dist-{os.getpid()}-{folder.name}"
    cgroup.mkdir()
    try:
        (cgroup / limit).write_text(str(MEMORY_MIB << 20))
        (folder / "cgroup").symlink_to(cgroup)
        yield
    finally:
        assert settled(lambda: _removed(cgroup), True), f"{cgroup} is still in use"


def _removed(cgroup: Path) -> bool:
    try:
        cgroup.rmdir()
    except OSError:
        return False
    return True


class Stopwatch:
    """Measures the time from a fault to the end of all processes of the job."""

    def __init__(self, rig: Rig) -> None:
        self._rig, self._began = rig, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def all_ended(self) -> float:
        """Return the seconds until the job had no process left on any host. Fails if that takes too long."""
        return self._ended("")

    def ranks_ended(self) -> float:
        """As `all_ended`, but only for ranks and their watchdogs; Slurm's own processes may wait longer."""
        return self._ended("python")

    def _ended(self, name: str) -> float:
        def left() -> list[str]:
            return [line for line in self._rig.running() if name in line.partition(": ")[2].partition(" ")[0]]

        limit = TIMEOUT + BEYOND
        found = settled(left, [], seconds=limit - self.seconds(), every=SELDOM)
        assert found == [], f"after {limit} s: {found}"
        return self.seconds()


def culprit(run: Path) -> str:
    """Return the headline of RUN/FAILED."""
    return (run / "FAILED").read_text().partition("\n")[0]


def last_words(said: str) -> str:
    """Return a log from the last line on in which a rank says what happened."""
    at = [match.start() for match in re.finditer(r"rank \d+ on h\d ", said)]
    return said[at[-1] :] if at else ""
