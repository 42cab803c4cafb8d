"""The processes that started this rank, and have to live for as long as it does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lowrank_dist.backend.processes import DEEPSPEED, ancestors, parent, started, words

_NODE = ("deepspeed.launcher.launch", "launch.py")  # deepspeed's, one a node
_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
_NODE_NAME, _TORCHRUN_NAME = "deepspeed's node launcher", "torchrun"
# What only these launchers set.
_SIGNS = {"CROSS_RANK": _NODE_NAME, "TORCHELASTIC_RUN_ID": _TORCHRUN_NAME}


class Launcher(NamedTuple):
    """started: as `processes.started` says; "" for one that is gone."""

    pid: int
    started: str
    name: str

    def lives(self) -> bool:
        return bool(self.started) and started(Path("/proc", str(self.pid))) == self.started


def find_launchers(environment: Mapping[str, str] = os.environ) -> list[Launcher]:
    """The launchers above this rank, and the deepspeed that reached this node over pdsh.

    A process that is no launcher is not among them: a shell may end while its job goes on.
    """
    found = [Launcher(int(process.name), started(process), name) for process, name in _above()]
    if os.getppid() == 1:  # nobody's child: its launcher may have ended before it could be seen
        names = {launcher.name for launcher in found}
        found += [Launcher(0, "", name) for sign, name in _SIGNS.items() if sign in environment and name not in names]
    return found


def _above() -> Iterator[tuple[Path, str]]:
    node = None
    for process in ancestors():
        name = launcher_name(words(process))
        if name is not None:
            yield process, name
            node = process if name == _NODE_NAME else None
        elif node is not None and _is_session(words(process)):
            # Nothing of deepspeed's is above its node launcher but the ssh session that pdsh holds.
            yield process, "the ssh session of pdsh"
            break
    if node is not None:
        yield from _runner_of(words(node))


def launcher_name(command: Sequence[str]) -> str | None:
    """Return the kind of launcher that a command line is, None for anything else."""
    names = {os.path.basename(word) for word in command[:4]}
    if names.intersection(_NODE) and any(word.startswith("--world_info") for word in command):
        return _NODE_NAME
    if names.intersection(DEEPSPEED):
        return "deepspeed"
    if command and command[0].startswith("slurmstepd"):  # it writes the step's number into its command line
        return "slurmstepd"
    return _TORCHRUN_NAME if names.intersection(_TORCHRUN) else None


def _is_session(command: Sequence[str]) -> bool:
    line = " ".join(command)
    return line.startswith("sshd") and "@" in line


def _runner_of(node: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """The deepspeed whose pdsh started this node launcher, where it runs on this machine."""
    world = next(word for word in node if word.startswith("--world_info"))
    for process in Path("/proc").glob("[0-9]*"):
        command = words(process)
        if command and os.path.basename(command[0]) == "pdsh" and any(world in word for word in command):
            above = parent(process)
            if above is not None and launcher_name(words(above)) == "deepspeed":
                yield above, "deepspeed"
                return
