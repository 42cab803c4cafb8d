"""Which rank of which job this process is, as its launcher says."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from lowrank_dist.backend.launchers import ranks_from_slurm, refuse_missing_hostfile
from lowrank_dist.errors import UserError


@dataclass(frozen=True)
class Place:
    """A rank of a job. host: this node's name. agent: the launcher keeps the job's store, not rank 0 (torchrun)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    master: str
    port: int
    agent: bool


def speaks_for_node() -> bool:
    """Whether this rank is the one to say what the others of its node would say as well."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def place_in_job() -> Place | None:
    """This process's place, or None where it was started alone or torch, without which ranks cannot meet, is missing.

    Raises UserError where a launcher said only half of it, or went on without its hostfile.
    """
    refuse_missing_hostfile()
    ranks_from_slurm()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: start doctor with deepspeed, "
            "torchrun or srun, or unset WORLD_SIZE to look at this machine alone"
        )
    try:
        rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and MASTER_PORT have to be numbers ({error}): mend the launcher's") from None
    try:
        from lowrank_dist.backend.select import local_rank_and_size
    except ImportError:
        return None
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    local = local_rank_and_size()
    return Place(rank, size, *local, socket.gethostname(), os.environ["MASTER_ADDR"], port, agent)
