"""The processes that started this rank, read from /proc, and the rank variables that a launcher does not set itself.

Imports only the standard library, because a watchdog imports this module. Without /proc no process is found.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lowrank_dist.backend.rank_variables import check_rank_variables, number
from lowrank_dist.errors import UserError

# The names of the `deepspeed` runner on its command line, and its options for the hostfile.
_DEEPSPEED = ("deepspeed", "deepspeed.launcher.runner", "ds")
_HOSTFILE = ("-H", "--hostfile")
_NODE = ("deepspeed.launcher.launch", "launch.py")  # deepspeed's node launcher, one per node
_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
_NODE_NAME, _TORCHRUN_NAME = "deepspeed's node launcher", "torchrun"
# Environment variables that only these launchers set.
_SIGNS = {"CROSS_RANK": _NODE_NAME, "TORCHELASTIC_RUN_ID": _TORCHRUN_NAME}
# MASTER_PORT is _FIRST_PORT + (job + _STRIDE · step) mod _PORTS: below the ports that Linux uses for outgoing
# connections, and different for jobs that share a node and for the steps of a job. Steps of two jobs can collide where
# the job numbers differ by a multiple of the stride, and such jobs seldom run at once. As in launch/slurm/task.sh.
_FIRST_PORT, _PORTS, _STRIDE = 10000, 20000, 6007
# The first name of a host list, with its number lists in brackets, up to the first comma outside brackets.
_FIRST_HOST = re.compile(r"([^\[\],](?:[^\[\],]|\[\d[^\[\]]*\])*)(?:,.*)?")
# The tasks of one node ("2") or of several alike ("2(x3)"). Slurm itself supports at most 65,536 nodes.
_TASKS, _MOST_NODES = re.compile(r"(\d{1,7})(?:\(x(\d{1,7})\))?", re.ASCII), 1 << 16
# Indices into `stat_fields`, which begins with field 3: proc(5) numbers the fields from 1, process id and name first.
STATE, USER_TICKS, SYSTEM_TICKS, STARTED, EXIT_CODE = (number - 3 for number in (3, 14, 15, 22, 52))


def ancestors() -> Iterator[Path]:
    """Yield /proc/PID of this process's parent, of the parent's parent, and so on."""
    process: Path | None = Path("/proc") / str(os.getppid())
    while process is not None and process.name != "0" and (process / "status").exists():
        yield process
        process = parent(process)


def parent(process: Path) -> Path | None:
    """Return /proc/PID of the parent; None where the process has ended."""
    try:
        # The kernel cuts a program's name off after 15 bytes, also inside a character.
        status = (process / "status").read_text(errors="replace")
    except OSError:
        return None
    return process.parent / next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:"))


def command_line(process: Path) -> list[str]:
    """Return the command line of /proc/PID; empty where the process has ended."""
    try:
        return (process / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
    except OSError:
        return []


def stat_fields(process: Path) -> list[str]:
    """Return the fields of /proc/PID/stat, beginning with the state; empty if the process has ended and was reaped."""
    try:
        return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def start_time(process: Path) -> str:
    """Return a process's start time, which tells it from a later process with the same id; "" where it has ended."""
    fields = stat_fields(process)
    return fields[STARTED] if is_running(fields) else ""


def is_running(fields: list[str]) -> bool:
    """Return whether `stat_fields` belong to a process that has not ended."""
    return bool(fields) and fields[STATE] not in "ZX"


class Launcher(NamedTuple):
    """A process that started this rank. start_time: as `start_time` returns it; "" for a process that is gone."""

    pid: int
    start_time: str
    name: str

    def is_alive(self) -> bool:
        return bool(self.start_time) and start_time(Path("/proc", str(self.pid))) == self.start_time


def find_launchers(environment: Mapping[str, str] = os.environ) -> list[Launcher]:
    """Return the launchers above this rank, and the deepspeed that reached this node over pdsh.

    Ancestors that are not launchers are left out: a shell, for example, may end while its job goes on.
    """
    found = [Launcher(int(process.name), start_time(process), name) for process, name in _above()]
    if os.getppid() == 1:  # orphaned: its launcher may have ended before it could be seen
        names = {launcher.name for launcher in found}
        found += [Launcher(0, "", name) for sign, name in _SIGNS.items() if sign in environment and name not in names]
    return found


def _above() -> Iterator[tuple[Path, str]]:
    node = None
    for process in ancestors():
        name = launcher_name(command_line(process))
        if name is not None:
            yield process, name
            node = process if name == _NODE_NAME else None
        elif node is not None and _is_session(command_line(process)):
            # The only launcher above deepspeed's node launcher is the ssh session that pdsh holds.
            yield process, "the ssh session of pdsh"
            break
    if node is not None:
        yield from _runner_of(command_line(node))


def launcher_name(command: Sequence[str]) -> str | None:
    """Return the kind of launcher that a command line belongs to; None for any other command."""
    names = {os.path.basename(word) for word in command[:4]}
    if names.intersection(_NODE) and any(word.startswith("--world_info") for word in command):
        return _NODE_NAME
    if names.intersection(_DEEPSPEED):
        return "deepspeed"
    if command and command[0].startswith("slurmstepd"):  # it writes the step's number into its command line
        return "slurmstepd"
    return _TORCHRUN_NAME if names.intersection(_TORCHRUN) else None


def _is_session(command: Sequence[str]) -> bool:
    line = " ".join(command)
    return line.startswith("sshd") and "@" in line


def _runner_of(node: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yield the deepspeed whose pdsh started this node launcher, where it runs on this machine."""
    world = next(word for word in node if word.startswith("--world_info"))
    for process in Path("/proc").glob("[0-9]*"):
        command = command_line(process)
        if command and os.path.basename(command[0]) == "pdsh" and any(world in word for word in command):
            above = parent(process)
            if above is not None and launcher_name(command_line(above)) == "deepspeed":
                yield above, "deepspeed"
                return


def refuse_missing_hostfile() -> None:
    """Raise UserError where this rank was started by `deepspeed --hostfile FILE` and FILE does not exist.

    The launcher only warns and starts its ranks on this machine. It passes on neither FILE nor the intended number of
    hosts, but it is an ancestor of the ranks, and Linux shows its command line.
    """
    for process in ancestors():
        named = named_hostfile(command_line(process))
        if named is None:
            continue
        # FILE is relative to the working directory of the launcher.
        path = Path(os.readlink(process / "cwd")) / named
        if not path.is_file():
            raise UserError(
                f"deepspeed --hostfile: {path} is not a file, so the launcher would use this machine alone; correct "
                "the path, or leave --hostfile out to train here"
            )


def named_hostfile(command: Sequence[str]) -> str | None:
    """Return the FILE of a command line `[python] deepspeed --hostfile FILE … SCRIPT …`; None for any other command."""
    programs = [at for at, word in enumerate(command) if os.path.basename(word) in _DEEPSPEED]
    if not programs:
        return None
    rest = iter(command[programs[0] + 1 :])
    for word in rest:
        name, given, value = word.partition("=")
        if name in _HOSTFILE:
            return value if given else next(rest, None)
        if word.endswith(".py"):  # the arguments after it are the script's
            return None
    return None


def set_rank_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, … and MASTER_PORT from a Slurm step's variables, and check those of any launcher.

    A variable that is set stays. If RANK is set, only LOCAL_WORLD_SIZE is added: scripts and hooks of containers often
    set the others alone. Nothing is set outside a Slurm step: in a batch script Slurm's variables describe one task,
    although no step was started. Raises UserError for variables that no launcher sets in this way, and
    RankIdentityError if only this rank's own variables are wrong.
    """
    if not ("RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment or "SLURM_PROCID" not in environment):
        _set_from_step(environment)
    elif _is_task(environment) and not {"LOCAL_WORLD_SIZE", "LOCAL_SIZE"} & set(environment):
        environment["LOCAL_WORLD_SIZE"] = _tasks_here(environment)
    check_rank_variables(environment)


def _set_from_step(environment: MutableMapping[str, str]) -> None:
    environment["RANK"] = str(number(environment, "SLURM_PROCID"))
    environment["WORLD_SIZE"] = str(number(environment, "SLURM_STEP_NUM_TASKS"))
    environment["LOCAL_RANK"] = str(number(environment, "SLURM_LOCALID"))
    environment["LOCAL_WORLD_SIZE"] = _tasks_here(environment)
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if "MASTER_PORT" not in environment:
        place = number(environment, "SLURM_JOB_ID") + _STRIDE * number(environment, "SLURM_STEP_ID", "0")
        environment["MASTER_PORT"] = str(_FIRST_PORT + place % _PORTS)


def _is_task(environment: Mapping[str, str]) -> bool:
    """Return whether this rank, whose numbers are set, is a task of a Slurm step.

    A batch script may start ranks by other means, on its own node even without a step.
    """
    tasks = environment.get("SLURM_PROCID"), environment.get("SLURM_STEP_NUM_TASKS")
    return {"RANK", "SLURM_STEP_ID"} <= set(environment) and tasks == (
        environment.get("RANK"),
        environment.get("WORLD_SIZE"),
    )


def _tasks_here(environment: Mapping[str, str]) -> str:
    """Return the number of the step's tasks on this node."""
    tasks, node = _tasks_of(environment.get("SLURM_STEP_TASKS_PER_NODE", "")), number(environment, "SLURM_NODEID", "0")
    if node >= len(tasks):
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE: {environment.get('SLURM_STEP_TASKS_PER_NODE')!r} has no tasks for node "
            f"{node} (SLURM_NODEID); start the ranks with srun, or set RANK, WORLD_SIZE, LOCAL_RANK and "
            "LOCAL_WORLD_SIZE"
        )
    if sum(tasks) != int(environment["WORLD_SIZE"]):
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE: {environment['SLURM_STEP_TASKS_PER_NODE']!r} does not add up to "
            f"SLURM_STEP_NUM_TASKS={environment['WORLD_SIZE']}; start the ranks with srun"
        )
    return str(tasks[node])


def is_first_on_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this is local rank 0, which reports for its node before the ranks have met."""
    return environment.get("LOCAL_RANK", "0") == "0"


def run_token(environment: Mapping[str, str] = os.environ) -> str:
    """Return a text that is the same for all ranks of one run and differs between runs, from the launcher's variables.

    It is readable, for messages. For ranks that were started by hand it has only their number.
    """
    size = f"{environment.get('WORLD_SIZE', '1')} ranks"
    if "TORCHELASTIC_RUN_ID" in environment:
        return f"torchrun's run {environment['TORCHELASTIC_RUN_ID']}, {size}"
    if "CROSS_RANK" in environment:
        return f"deepspeed{_deepspeed_job()}, {size}"
    if _is_task(environment):
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        job, step, restarts = (environment.get(name, "0") for name in names)
        return f"Slurm's job {job}, step {step}, restart {restarts}, {size}"
    return size


def _deepspeed_job() -> str:
    """Return the hosts and devices of this rank's deepspeed job, and its process where the job has a single host."""
    for process in ancestors():
        command = command_line(process)
        if launcher_name(command) == _NODE_NAME:
            world = next(word for word in command if word.startswith("--world_info")).partition("=")[2]
            try:
                hosts = json.loads(base64.urlsafe_b64decode(world))
                single = len(hosts) == 1
            except (ValueError, TypeError):
                return f" on {world}"
            return f" on {json.dumps(hosts)}{f', process {process.name} of {start_time(process)}' if single else ''}"
    return ""


def first_host(nodes: str) -> str:
    """Return the first name of a Slurm host list: "a[07-09,12],b1" → "a07". Raises UserError for any other text."""
    match = _FIRST_HOST.fullmatch(nodes)
    if match is None:
        raise UserError(
            f"SLURM_STEP_NODELIST: {nodes[:80]!r} cannot be parsed; set MASTER_ADDR to the first node's name"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[1])


def _tasks_of(text: str) -> list[int]:
    """Return the tasks of each node: "2(x2),1" → [2, 2, 1]. Raises UserError for any other text."""
    found = [_TASKS.fullmatch(part) for part in text.split(",")]
    counts = [(int(match[1]), int(match[2] or 1)) for match in found if match is not None]
    if len(counts) < len(found) or sum(times for _, times in counts) > _MOST_NODES:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE: {text[:40]!r} is not what Slurm sets for a step; start the ranks with srun, "
            "or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    return [tasks for tasks, times in counts for _ in range(times)]
