"""The rig's hosts are separate, and nothing of a rig is left however its owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.rig import Rig, settled
from tests.integration.launching import ROOT

OWNER = """
import time
from tests.cluster.rig import Rig
with Rig(2) as rig:
    rig.hosts[1].start(["sleep", "{mark}"], seconds=600)
    print(rig.hosts[0].rig_pid, flush=True)
    time.sleep(600)
"""


def test_hosts_are_apart(rig: Rig) -> None:
    first, second = rig.hosts
    assert [host.run(["hostname"]).stdout for host in rig.hosts] == ["h1\n", "h2\n"]
    assert first.run(["touch", "/dev/shm/mine", "/run/mine"]).code == 0
    assert second.run(["ls", "/dev/shm/mine"]).code == second.run(["ls", "/run/mine"]).code == 2
    # Each host has its own loopback, the switch connects the hosts, and ssh asks nothing.
    listening = first.start([sys.executable, "-m", "http.server", "8123", "--bind", "h1"], seconds=300)
    get = ["bash", "-c", "until exec 3<>/dev/tcp/$0/8123; do sleep 0.2; done 2> /dev/null"]
    assert second.run([*get, "h1"], seconds=60).code == 0
    assert second.run([*get, "127.0.0.1"], seconds=2).code == 124
    first.kill("http.server 8123")
    listening.wait()
    assert second.run(["ssh", "h1", "hostname"]).stdout == "h1\n"


def test_slurm_runs_on_both(rig: Rig) -> None:
    done = rig.hosts[0].run(["srun", "--nodes=2", "--ntasks-per-node=2", "hostname"])
    assert (done.code, sorted(done.stdout.split())) == (0, ["h1", "h1", "h2", "h2"])


def test_a_process_left_behind_is_seen(rig: Rig) -> None:
    assert rig.idle() == []
    left = rig.hosts[1].start(["sleep", "77.5"], seconds=60)
    try:
        assert any("sleep 77.5" in line for line in settled(rig.hosts[1].processes, None, seconds=1))
    finally:
        rig.hosts[1].run(["pkill", "-f", "^sleep 77.5"])
        left.wait()


def test_a_killed_owner_leaves_nothing() -> None:
    mark = f"{600 + os.getpid() / 1e7:.7f}"
    mounts, cards = Path("/proc/self/mounts").read_text(), sorted(os.listdir("/sys/class/net"))
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(mark=mark)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    rig_pid = int(owner.stdout.readline())
    assert settled(lambda: running(mark), True), "the process that is to vanish was not there"
    assert Path(f"/proc/{rig_pid}/root").exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert settled(lambda: running(mark), False) is False
    assert settled(lambda: running("tests/cluster/rig.sh", rig_pid), False) is False
    time.sleep(0.5)
    assert (Path("/proc/self/mounts").read_text(), sorted(os.listdir("/sys/class/net"))) == (mounts, cards)


def running(words: str, pid: int | None = None) -> bool:
    """Return whether a process (with this id, where given) has these words on its command line."""
    for path in Path("/proc").glob(str(pid or "[0-9]*")):
        try:
            if path.name != str(os.getpid()) and words.encode() in (path / "cmdline").read_bytes().replace(b"\0", b" "):
                return True
        except OSError:  # it ended meanwhile
            continue
    return False
