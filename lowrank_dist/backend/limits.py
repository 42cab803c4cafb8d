"""The memory and the CPUs that this process may use: those of the machine, within the limits that are set on it.

Containers, batch systems and systemd set limits on control groups (cgroups), and a process is bound by the limits of
its own cgroup and of every cgroup above it. Limits of the process itself come from ulimit. Swap is not counted.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_CGROUP_REMEDY = "Slurm's --mem, docker's --memory, systemd's MemoryMax"
# Files of a memory cgroup: the limit, what is used of it, and the keys in memory.stat of page cache, which the kernel
# frees before a limit is exceeded (as MemAvailable has it). Version 1 counts memory and swap together in memsw.
_MEMORY_FILES = {
    1: (
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
    ),
    2: (("memory.max", "memory.current"), ("memory.high", "memory.current")),
}
_PAGE_CACHE = {1: ("total_inactive_file", "total_active_file"), 2: ("inactive_file", "active_file")}


@dataclass(frozen=True)
class MemoryBound:
    """An upper bound on the memory that a process can still take.

    limit, available: bytes that the limit allows, and those of them that are left. source: where the limit is set.
    remedy: how it is raised; "" for the machine's own memory. of_process: the limit is this process's alone.
    """

    limit: int
    available: int
    source: str
    remedy: str = ""
    of_process: bool = False

    def share(self, processes: int) -> int:
        """Return the bytes for each of `processes` that are under the same limit."""
        return self.available if self.of_process else self.available // processes

    def __str__(self) -> str:
        return f"limit of {self.limit / 2**30:.2f} GiB: {self.source}"


def memory_bound(processes: int = 1, root: Path = ROOT) -> MemoryBound:
    """Return the tightest bound on this process's host memory.

    processes: those that share the machine's memory and start at the same time. root: that of the file system.
    """
    bounds = [machine_memory(root), *_cgroup_bounds(root), *_ulimits(root)]
    return min(bounds, key=lambda bound: bound.share(processes))


def machine_memory(root: Path = ROOT) -> MemoryBound:
    """Return the memory of the machine, and what is available of it."""
    kib = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    total, available = (int(kib[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return MemoryBound(total, available, "MemAvailable of /proc/meminfo")


def _cgroup_bounds(root: Path) -> Iterator[MemoryBound]:
    for cgroup, version in _cgroups("memory", root):
        stat = dict(line.split() for line in _text(cgroup / "memory.stat").splitlines() if len(line.split()) == 2)
        cache = sum(int(stat.get(key, 0)) for key in _PAGE_CACHE[version])
        for limit_name, usage_name in _MEMORY_FILES[version]:
            limit, usage = _number(cgroup / limit_name), _number(cgroup / usage_name)
            if limit is not None and usage is not None:
                available = max(0, min(limit, limit - usage + cache))
                yield MemoryBound(limit, available, f"{limit_name} of {cgroup}", _CGROUP_REMEDY)
        # Version 1: the tightest limit of all cgroups above, also of those that a container does not see.
        limit, usage = int(stat.get("hierarchical_memory_limit", 0)), _number(cgroup / "memory.usage_in_bytes")
        if limit and usage is not None:
            source = f"hierarchical_memory_limit in {cgroup}/memory.stat"
            yield MemoryBound(limit, max(0, min(limit, limit - usage + cache)), source, _CGROUP_REMEDY)


def _ulimits(root: Path) -> Iterator[MemoryBound]:
    # The address space and the data of this process, which the kernel holds against the limits.
    status = dict(line.split(":", 1) for line in _text(root / "proc/self/status").splitlines() if ":" in line)
    for kind, flag, used in ((resource.RLIMIT_AS, "-v", "VmSize"), (resource.RLIMIT_DATA, "-d", "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and used in status:
            available = max(0, limit - int(status[used].split()[0]) * 1024)
            yield MemoryBound(limit, available, f"ulimit {flag}", f"`ulimit {flag} unlimited`", of_process=True)


@dataclass(frozen=True)
class CpuBound:
    """The CPUs that this process may use. source: where the number is set; "" where it is that of the machine."""

    count: int
    source: str


def cpu_bound(root: Path = ROOT) -> CpuBound:
    """Return the CPUs of this process: the machine's, its CPU set's (taskset, Slurm, docker) or a quota's in CPUs.

    A quota is rounded up: with 150 % of a CPU two threads are busy at times.
    """
    everywhere, allowed = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    bounds = [CpuBound(allowed, "" if allowed == everywhere else "the CPU set of this process (sched_getaffinity)")]
    for cgroup, version in _cgroups("cpu", root):
        if version == 2:
            name, words = "cpu.max", _text(cgroup / "cpu.max").split()
        else:
            name = "cpu.cfs_quota_us"
            words = [*_text(cgroup / name).split(), *_text(cgroup / "cpu.cfs_period_us").split()]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            bounds.append(CpuBound(max(1, -(-int(words[0]) // int(words[1]))), f"{name} of {cgroup}"))
    return min(bounds, key=lambda bound: bound.count)


def process_bounds(root: Path = ROOT) -> Iterator[tuple[Path, int]]:
    """Yield the cgroups that bound the number of processes and threads, and their limits; ulimit -u not counted."""
    for cgroup, _ in _cgroups("pids", root):
        limit = _number(cgroup / "pids.max")
        if limit is not None:
            yield cgroup, limit


def _cgroups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """Yield this process's cgroup of a controller and all above it in each mount, with the version of cgroups."""
    paths = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    for version, mounted, place in _mounts(controller, root):
        own = _below(mounted, paths[version], place) if version in paths else None
        while own is not None:
            yield own, version
            # In version 1 a cgroup without use_hierarchy does not bind those below it.
            above = None if own == place else own.parent
            own = None if above is not None and _text(above / "memory.use_hierarchy").strip() == "0" else above


def _mounts(controller: str, root: Path) -> Iterator[tuple[int, str, Path]]:
    """Yield the mounts of a controller: the version, the cgroup that is mounted, and the place."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        version = {"cgroup": 1, "cgroup2": 2}.get(kind[0])
        if version == 2 or (version == 1 and controller in kind[-1].split(",")):
            mounted, place = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text) for text in fields[3:5])
            yield version, mounted, root / place.lstrip("/")


def _below(mounted: str, path: str, place: Path) -> Path | None:
    """Return the folder of the cgroup `path` in a mount of the cgroup `mounted`; None where the mount does not hold it.

    Both are relative to the root of this process's cgroup namespace: "/../.." is two levels above it. The names of
    those levels are not shown, so the folder is the one that lists this process.
    """
    top, own = _parts(mounted), _parts(path)
    above = top.count("..") - own.count("..")
    if above > 0 and top[-1] == "..":
        own = ["*"] * above + own
        return next((found for found in place.glob("/".join(own)) if _has_this_process(found)), None)
    if own[: len(top)] == top and ".." not in own[len(top) :]:
        return place.joinpath(*own[len(top) :])
    # A container may show the cgroup of the host beside a mount that begins at its own.
    return place if _has_this_process(place) else None


def _parts(path: str) -> list[str]:
    return [name for name in path.split("/") if name]


def _has_this_process(cgroup: Path) -> bool:
    return str(os.getpid()) in _text(cgroup / "cgroup.procs").split()


def _text(path: Path) -> str:
    """Return a file of the kernel; empty where it is missing or must not be read.

    Names in it, as of mounts, need not be in any encoding; they come as Python writes paths.
    """
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None
