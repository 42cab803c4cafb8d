"""Limits of memory and CPUs, in file trees as kernels and batch systems show them, and in a cgroup of this machine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowrank_dist.backend import limits
from lowrank_dist.backend.limits import cpu_bound, machine_memory, memory_bound, process_bounds
from lowrank_dist.backend.select import Backend
from lowrank_dist.doctor import machine

GIB = 1 << 30
V1_UNLIMITED = 9223372036854771712
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
V1_MOUNT = "35 31 0:32 {} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"
V2_MOUNT = "30 23 0:26 {} /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate"
MEMINFO = "MemTotal:       25165824 kB\nMemFree:        20000000 kB\nMemAvailable:   23068672 kB\n"


class Machine:
    """A root of a file system with 22 of 24 GiB available, and cgroups to be added."""

    def __init__(self, root: Path, cgroup: str, *mounts: str) -> None:
        self.root = root
        self.write("proc/meminfo", MEMINFO)
        self.write("proc/self/cgroup", cgroup + "\n")
        self.write("proc/self/mountinfo", "\n".join(mounts) + "\n")
        self.write("proc/self/status", "Name:\tpython\nVmSize:\t 1048576 kB\nVmData:\t 524288 kB\n")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def v1(self, folder: str, limit: int, usage: int = 0, **stat: int) -> None:
        self.write(f"{V1}{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{V1}{folder}/memory.usage_in_bytes", f"{usage}\n")
        self.write(f"{V1}{folder}/memory.use_hierarchy", "1\n")
        given = {"hierarchical_memory_limit": V1_UNLIMITED, **stat}
        self.write(f"{V1}{folder}/memory.stat", "".join(f"{key} {value}\n" for key, value in given.items()))

    def v2(self, folder: str, limit: int | str, usage: int = 0, high: int | str = "max", **stat: int) -> None:
        for name, value in (("max", limit), ("current", usage), ("high", high)):
            self.write(f"{V2}{folder}/memory.{name}", f"{value}\n")
        self.write(f"{V2}{folder}/memory.stat", "anon 1\n" + "".join(f"{key} {value}\n" for key, value in stat.items()))

    def told(self, processes: int = 1) -> tuple[int, str]:
        """Return the available bytes and the source of the limit, without the root of this machine."""
        bound = memory_bound(processes, self.root)
        return bound.available, bound.source.replace(f"{self.root}/", "/")


def test_no_limit_is_the_memory_of_the_machine(tmp_path: Path) -> None:
    """The control: limits that are not set, or are wider than the machine, change nothing."""
    whole = (22 * GIB, "MemAvailable of /proc/meminfo")
    assert Machine(tmp_path / "none", "0::/").told() == whole
    unlimited = Machine(tmp_path / "v1", "4:memory:/a", V1_MOUNT.format("/"))
    unlimited.v1("", V1_UNLIMITED, 9 * GIB)
    unlimited.v1("/a", V1_UNLIMITED, 8 * GIB)
    assert unlimited.told() == whole
    wide = Machine(tmp_path / "v2", "0::/a", V2_MOUNT.format("/"))
    wide.v2("/a", 400 * GIB, GIB)
    assert wide.told() == whole
    # A cgroup that this process is not in.
    wide.v2("/b", GIB)
    assert wide.told() == whole and memory_bound(2, wide.root).share(2) == 11 * GIB


def test_slurm_with_version_1(tmp_path: Path) -> None:
    """The job has the limit; the step and the task below it have none that is tighter."""
    job = "/slurm/uid_1000/job_7"
    place = Machine(tmp_path, f"11:cpuset:/x\n4:memory:{job}/step_0/task_1\n0::/system.slice", V1_MOUNT.format("/"))
    for folder, limit in (("", V1_UNLIMITED), ("/slurm", 20 * GIB), ("/slurm/uid_1000", 20 * GIB), (job, GIB)):
        place.v1(folder, limit, GIB // 2, total_inactive_file=GIB // 8, total_active_file=GIB // 8)
    for folder in (f"{job}/step_0", f"{job}/step_0/task_1"):
        place.v1(folder, V1_UNLIMITED, GIB // 4)
    assert place.told() == (3 * GIB // 4, f"memory.limit_in_bytes of /{V1}{job}")
    bound = memory_bound(2, place.root)
    assert bound.share(2) == 3 * GIB // 8 and str(bound).startswith("limit of 1.00 GiB: memory.limit_in_bytes of ")
    # Without use_hierarchy a cgroup does not bind those below it.
    place.write(f"{V1}{job}/memory.use_hierarchy", "0\n")
    assert place.told() == (22 * GIB, "MemAvailable of /proc/meminfo")


def test_systemd_and_slurm_with_version_2(tmp_path: Path) -> None:
    path = "/system.slice/slurmstepd.scope/job_7/step_0/user/task_0"
    place = Machine(tmp_path, f"0::{path}", V2_MOUNT.format("/"))
    job = "/system.slice/slurmstepd.scope/job_7"
    place.v2(path, "max", GIB // 4)
    place.v2(job, 2 * GIB, GIB, inactive_file=GIB // 4)
    assert place.told() == (5 * GIB // 4, f"memory.max of /{V2}{job}")
    # Above memory.high the kernel throttles the processes and takes memory away from them.
    place.v2(job, 2 * GIB, GIB, high=GIB + GIB // 2)
    assert place.told() == (GIB // 2, f"memory.high of /{V2}{job}")
    place.v2(job, GIB, 2 * GIB)
    assert place.told()[0] == 0


def test_containers(tmp_path: Path) -> None:
    """Docker and Kubernetes: a namespace of cgroups or none, version 1 or 2."""
    namespace = Machine(tmp_path / "v2", "0::/", V2_MOUNT.format("/"))
    namespace.v2("", GIB)
    assert namespace.told() == (GIB, f"memory.max of /{V2}")
    # Version 1 without a namespace: the mount begins at the container's cgroup, and a limit above it is told in stat.
    pod = "/kubepods/burstable/pod12/c3"
    bound = Machine(tmp_path / "v1", f"4:memory:{pod}", V1_MOUNT.format(pod))
    bound.v1("", 4 * GIB)
    assert bound.told() == (4 * GIB, f"memory.limit_in_bytes of /{V1}")
    bound.v1("", V1_UNLIMITED, GIB // 4, hierarchical_memory_limit=GIB)
    assert bound.told() == (3 * GIB // 4, f"hierarchical_memory_limit in /{V1}/memory.stat")
    # A process of a container whose host's cgroups are mounted: its names are those of the host.
    host = Machine(tmp_path / "host", "4:memory:/docker/abc", V1_MOUNT.format("/"))
    host.v1("", V1_UNLIMITED)
    host.v1("/docker/abc", GIB)
    assert host.told() == (GIB, f"memory.limit_in_bytes of /{V1}/docker/abc")


def test_mounts_from_outside_the_namespace(tmp_path: Path) -> None:
    """The mount begins two cgroups above the namespace's root, whose names are not told."""
    place = Machine(tmp_path / "above", "4:memory:/own", V1_MOUNT.format("/../.."))
    for folder in ("/a/other/own", "/a/b/own"):
        place.v1(folder, GIB if "/b/" in folder else 2 * GIB)
        place.write(f"{V1}{folder}/cgroup.procs", f"{os.getpid() if '/b/' in folder else 1}\n")
    assert place.told() == (GIB, f"memory.limit_in_bytes of /{V1}/a/b/own")
    # A process outside of the namespace's root, and a mount that does not show its cgroup.
    for mounted, path in (("/", "/../other"), ("/docker/abc", "/user.slice")):
        outside = Machine(tmp_path / f"outside{mounted.count('/')}", f"0::{path}", V2_MOUNT.format(mounted))
        outside.v2("", GIB)
        assert outside.told() == (22 * GIB, "MemAvailable of /proc/meminfo")
        outside.write(f"{V2}/cgroup.procs", f"1\n{os.getpid()}\n")
        assert outside.told() == (GIB, f"memory.max of /{V2}")


def test_limits_on_processes(tmp_path: Path) -> None:
    """Every cgroup above the process counts; the value "max" is none."""
    place = Machine(tmp_path, "0::/job/step", V2_MOUNT.format("/"))
    place.write(f"{V2}/job/step/pids.max", "max\n")
    place.write(f"{V2}/job/pids.max", "77\n")
    assert list(process_bounds(tmp_path)) == [(tmp_path / V2 / "job", 77)]


def test_names_with_spaces_and_several_mounts(tmp_path: Path) -> None:
    mounts = (r"9 8 0:32 / /mnt/my\040cgroups rw - cgroup2 none rw", V2_MOUNT.format("/"), "bad line")
    place = Machine(tmp_path, "0::/a b:c", *mounts)
    place.v2("/a b:c", "max")
    place.write("mnt/my cgroups/a b:c/memory.max", f"{GIB}\n")
    place.write("mnt/my cgroups/a b:c/memory.current", "0\n")
    assert place.told() == (GIB, "memory.max of /mnt/my cgroups/a b:c")


def test_names_in_no_encoding(tmp_path: Path) -> None:
    """A share with Latin-1 names; a name of this process that the kernel has cut off inside a character."""
    place = Machine(tmp_path, "0::/job")
    (tmp_path / "proc/self/status").write_bytes("Name:\ttraining训练\n".encode()[:-2] + b"\nVmSize:\t 10 kB\n")
    mounts = b"40 23 8:1 / /mnt/donn\xe9es rw - nfs nas:/donn\xe9es rw\n" + V2_MOUNT.format("/").encode()
    (tmp_path / "proc/self/mountinfo").write_bytes(mounts)
    place.v2("/job", GIB)
    assert place.told() == (GIB, "memory.max of /sys/fs/cgroup/job")


@pytest.mark.parametrize(("kind", "flag", "left"), [("RLIMIT_AS", "-v", 2), ("RLIMIT_DATA", "-d", 2.5)])
def test_limits_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, flag: str, left: float
) -> None:
    """They are for each rank alone, so ranks do not share them."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    set_ = {getattr(resource, kind): (3 * GIB, 4 * GIB)}
    monkeypatch.setattr(limits.resource, "getrlimit", lambda asked: set_.get(asked, unlimited))
    place = Machine(tmp_path, "0::/")
    assert place.told(4) == (left * GIB, f"ulimit {flag}")
    bound = memory_bound(4, place.root)
    assert bound.share(4) == bound.available and f"ulimit {flag} unlimited" in bound.remedy
    # Of sixteen ranks each has 1.4 GiB of the machine, which is less.
    assert place.told(16) == (22 * GIB, "MemAvailable of /proc/meminfo")


def test_cpus(tmp_path: Path) -> None:
    own = len(os.sched_getaffinity(0))
    free = Machine(tmp_path / "free", "0::/a", V2_MOUNT.format("/"))
    free.write(f"{V2}/a/cpu.max", "max 100000\n")
    assert cpu_bound(free.root).count == own
    free.write(f"{V2}/cpu.max", "50000 100000\n")
    assert cpu_bound(free.root) == limits.CpuBound(1, f"cpu.max of {free.root}/{V2}")
    quota = "9 8 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
    old = Machine(tmp_path / "old", "2:cpu,cpuacct:/job", quota)
    old.write("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n")
    old.write("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "-1\n")
    assert cpu_bound(old.root).count == own
    old.write("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "90000\n")
    assert cpu_bound(old.root).count == 1 and "cpu.cfs_quota_us of " in cpu_bound(old.root).source
    (row,) = machine.cpus()
    assert row.state == "ok" and row.detail.startswith(f"{cpu_bound().count} usable")


@pytest.fixture
def real_cgroup() -> Iterator[Path]:
    """A cgroup two below one with a limit of 1 GiB, of the version that this machine has."""
    first = Path("/sys/fs/cgroup/memory")
    hierarchy, limit = (first, "memory.limit_in_bytes") if first.exists() else (first.parent, "memory.max")
    outer = hierarchy / f"lowrank_dist-limits-{os.getpid()}"
    try:
        (outer / "middle" / "inner").mkdir(parents=True)
        (outer / limit).write_text(str(GIB))
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield outer
    for folder in (outer / "middle" / "inner", outer / "middle", outer):
        folder.rmdir()


def test_a_rank_and_doctor_in_a_real_cgroup(real_cgroup: Path) -> None:
    code = (
        f"open('{real_cgroup}/middle/inner/cgroup.procs', 'w').write('0')\n"
        "import torch\n"
        "from lowrank_dist.backend.select import Backend\n"
        "from lowrank_dist.doctor.machine import memory\n"
        "print(Backend(torch.device('cpu'), 'gloo', 'cpu', 2).memory_for_a_rank())\n"
        "print(memory()[0].detail)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    rank, row = done.stdout.splitlines()
    assert GIB // 8 < int(rank) < GIB // 2
    assert row.partition(" available")[0].endswith("MiB") and "limited to 1.0 GiB by memory." in row
    assert str(real_cgroup) in row


def test_this_process_has_what_the_machine_has() -> None:
    """The control of the real machine: without a limit of our own, nothing is refused."""
    bound = memory_bound()
    assert 0 < bound.available <= machine_memory().limit
    assert Backend(torch.device("cpu"), "gloo", "cpu").memory_for_a_rank() > GIB // 4
