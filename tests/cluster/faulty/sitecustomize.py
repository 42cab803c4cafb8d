"""Faults planted in a rank from outside its code: with this folder on PYTHONPATH, Python imports this file first.

FAULTS="KIND:RANK:STEP,…" names the fault of each rank and the step, counted from 1, at whose begin it happens. save:
as the rank sends the data of that step's checkpoint. slow: from that step on, until Slurm restarts the job. `gate` and
`save` write "STEP.reached" into FAULT_FOLDER and wait for "STEP.open"; `bloat` exceeds the cgroup in that folder.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

MIB = 1 << 20
ALLOWANCE = 256 * MIB  # of address space, beyond what the rank has mapped already
FOREVER = 10_000


def segfault(step: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dump of a GB in the working directory
    ctypes.string_at(0)


def spin(step: int) -> None:
    while True:
        pass


def allocate(step: int) -> None:
    """Allocate until Python raises MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWANCE,) * 2)
    eat()


def bloat(step: int) -> None:
    """Allocate until the kernel kills the process."""
    Path(os.environ["FAULT_FOLDER"], "cgroup", "cgroup.procs").write_text("0")
    eat()


def eat() -> None:
    held = []
    while True:
        held.append(bytearray(b"x" * MIB))


def fail(step: int) -> None:
    raise RuntimeError("planted")


def hold(step: int) -> None:
    """Block in C without releasing the interpreter's lock, whatever signal arrives."""
    lock, libc = (ctypes.c_long * 16)(), ctypes.PyDLL(None)
    for _ in range(2):
        libc.pthread_mutex_lock(lock)


def wait(step: int) -> None:
    folder = Path(os.environ["FAULT_FOLDER"])
    (folder / f"{step}.reached").touch()
    while not (folder / f"{step}.open").exists():
        time.sleep(0.02)


def doze(step: int) -> None:
    if "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(0.5)


# exit: without a message.
FAULTS: dict[str, Callable[[int], object]] = {
    "raise": fail,
    "kill": lambda step: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda step: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda step: time.sleep(FOREVER),
    "spin": spin,
    "hold": hold,
    "exit": lambda step: os._exit(3),
    "segfault": segfault,
    "allocate": allocate,
    "bloat": bloat,
    "gate": wait,
    "slow": doze,
}


def planted() -> list[tuple[str, int]]:
    """Return KIND and STEP of this rank's fault."""
    faults = (fault.split(":") for fault in os.environ.get("FAULTS", "").split(",") if fault)
    return [(kind, int(step)) for kind, rank, step in faults if rank == os.environ.get("RANK")]


def in_steps(module: ModuleType) -> None:
    step_of = module.Trainer._step

    def _step(self: object, step: int) -> None:
        self.run.phases.enter("data", step + 1)
        for kind, at in planted():
            if kind != "save" and (at == step + 1 or (kind == "slow" and at <= step)):
                FAULTS[kind](at)
        step_of(self, step)

    module.Trainer._step = _step


def in_saves(module: ModuleType) -> None:
    save_of = module.CheckpointSaver._save_in_thread

    def _save_in_thread(self: object, save: object, *rest: object) -> None:
        if ("save", save.step) in planted():
            wait(save.step)
        save_of(self, save, *rest)

    module.CheckpointSaver._save_in_thread = _save_in_thread


PLANT = {"lowrank_dist.engine.trainer": in_steps, "lowrank_dist.engine.saving": in_saves}


class Finder(importlib.abc.MetaPathFinder):
    """Finds modules as usual, and plants the faults in them."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name not in PLANT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            PLANT[name](module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
