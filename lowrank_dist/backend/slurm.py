"""Which rank this is where Slurm started it and no launcher said so: `srun … python launch/train.py CONFIG`."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from lowrank_dist.errors import UserError

# Below what Linux hands out for outgoing connections; jobs that share a node differ in their numbers.
_FIRST_PORT, _PORTS = 10000, 20000
# A name with one list of numbers or several in it, up to a comma that is not in a list.
_FIRST_HOST = re.compile(r"([^\[\],](?:[^\[\],]|\[\d[^\[\]]*\])*)(?:,.*)?")


def ranks_from_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the step's variables.

    What is set already stays. Nothing happens outside a step: the variables that a batch script has say one task where
    there are none.
    """
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment or "SLURM_PROCID" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    node = int(environment.get("SLURM_NODEID", "0"))
    environment["LOCAL_WORLD_SIZE"] = str(_tasks_of(environment["SLURM_STEP_TASKS_PER_NODE"])[node])
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORTS))


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: "a[07-09,12],b1" → "a07". UserError for what is none."""
    match = _FIRST_HOST.fullmatch(nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST: {nodes!r} is not understood; set MASTER_ADDR to the first node's name")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[1])


def _tasks_of(text: str) -> list[int]:
    """Tasks of each node: "2(x2),1" → [2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]
