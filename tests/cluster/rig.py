"""Several hosts and a Slurm on them, simulated on this machine (rig.sh) for as long as this process lives."""

from __future__ import annotations

import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.integration.launching import LAUNCHER_VARIABLES, ROOT, Outcome

SCRIPT = Path(__file__).with_name("rig.sh")
PROGRAMS = ("ip", "munged", "nsenter", "pdsh", "setpriv", "slurmctld", "slurmd", "sshd", "unshare")
START_SECONDS = 60
# Seconds between polls that start programs on the hosts: three rigs that poll without pause take a third of a core.
SELDOM = 0.8
# Services of a host, which run for as long as the rig does.
SERVICES = re.compile(r"(/bin/bash )?\S*(rig\.sh|sshd|munged|slurmctld|slurmd)\b|: slurmscriptd|sleep 3600$")


@dataclass(frozen=True)
class Host:
    """One host, that is a set of namespaces. `pid`: its first process, in the rig's PID namespace."""

    name: str
    rig_pid: int
    pid: int

    def start(
        self, command: Sequence[object], *, seconds: float, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command in the root of the repository; after `seconds` its process group is killed."""
        inside = f"nsenter -t {self.rig_pid} -a nsenter -t {self.pid} -a env -C {shlex.quote(str(ROOT))}"
        limited = ["timeout", "--kill-after=5", str(seconds), *(str(word) for word in command)]
        return subprocess.Popen(
            [*shlex.split(inside), *limited],
            env={**clean_environment(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, command: Sequence[object], *, seconds: float = 400, environment: Mapping[str, str] | None = None
    ) -> Outcome:
        """Run a command as `start` does and wait for it. Code 124: it took longer than `seconds`."""
        return wait(self.start(command, seconds=seconds, environment=environment))

    def kill(self, pattern: str) -> None:
        """Send SIGKILL to every process here whose command line matches. There must be at least one."""
        # The bracket keeps pkill's own shell from matching the pattern.
        done = self.run(["pkill", "-KILL", "-f", f"{pattern[:-1]}[{pattern[-1]}]"], seconds=20)
        assert done.code == 0, f"nothing on {self.name} matches {pattern}: {self.processes()}"

    def processes(self) -> list[str]:
        """Return the command lines of the processes here that are not services of the host."""
        done = self.run(["ps", "-e", "-o", "args="], seconds=60)
        assert done.code == 0, f"{self.name} does not answer: {done.stderr}"
        own = ("ps -e -o args=", "timeout --kill-after=5 60 ps")
        return [line for line in done.stdout.splitlines() if not SERVICES.match(line) and not line.startswith(own)]


class Rig:
    """The hosts h1 … hN and their Slurm; h1 is where jobs are submitted. A context manager."""

    def __init__(self, hosts: int) -> None:
        self._size = hosts
        self.hosts: list[Host] = []

    def __enter__(self) -> Rig:
        _refuse_without()
        # setpriv: if this process is killed, the kernel kills unshare, and --kill-child all its children.
        namespaces = ["--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--net", "--uts", "--ipc"]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, str(SCRIPT), str(self._size)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.hosts = self._started()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @contextmanager
    def cut_off(self, host: Host) -> Iterator[None]:
        """Cut a host off the network at the switch, so that its own interface still reports a link."""
        port = f"port{host.name.removeprefix('h')}"
        link = ["nsenter", "-t", str(host.rig_pid), "-a", "ip", "link", "set", port]
        subprocess.run([*link, "down"], check=True)
        try:
            yield
        finally:
            subprocess.run([*link, "up"], check=True)

    def running(self) -> list[str]:
        """Return the processes on all hosts that are not services."""
        return [f"{host.name}: {line}" for host in self.hosts for line in host.processes()]

    def idle(self) -> list[str]:
        """As `running`, after a short time in which processes may end."""
        return settled(self.running, [], every=SELDOM)

    def _started(self) -> list[Host]:
        readable, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        said = self._process.stdout.readline().split() if readable else []
        if said[:1] != ["ready"]:
            raise RuntimeError(f"{SCRIPT} {self._size} did not come up in {START_SECONDS} s; its messages are above")
        pid = int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0])
        return [Host(f"h{number}", pid, int(first)) for number, first in enumerate(said[1:], start=1)]


def wait(process: subprocess.Popen[str]) -> Outcome:
    stdout, stderr = process.communicate()
    return Outcome(process.returncode, stdout, stderr)


def settled(look: Callable[[], object], wanted: object, *, seconds: float = 240, every: float = 0.2) -> object:
    """Call `look` until it returns `wanted` or the time is over; return its last value. every: seconds between calls.

    seconds: a start may take a minute on a machine that is busy with other tests, and what waits for room two or three.
    """
    end = time.monotonic() + seconds
    while (found := look()) != wanted and time.monotonic() < end:
        time.sleep(every)
    return found


def clean_environment() -> dict[str, str]:
    """Return this process's environment without a launcher's variables, with the interpreter's programs on PATH."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def _refuse_without() -> None:
    if os.geteuid() != 0:
        raise RuntimeError("tests/cluster makes network hosts and a Slurm of its own: run it as root")
    missing = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not found: run tests/cluster/install.sh")
