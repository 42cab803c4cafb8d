"""The meeting of a job's ranks at MASTER_ADDR and MASTER_PORT, before they form a process group."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lowrank_dist.backend.launchers import run_token
from lowrank_dist.errors import RankIdentityError, UserError

_RUN = "lowrank_dist/run"  # key in the job's store: the run token of rank 0
_REMEDY = "give each run its own MASTER_PORT"


def require_place() -> None:
    """Raise UserError unless a launcher has said who this rank is and where the ranks meet."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"{', '.join(missing)} not set, because launch/train.py was started without a launcher; start it with "
            "`deepspeed --num_gpus N launch/train.py CONFIG`, torchrun or srun"
        )


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the job's store, this rank and the number of ranks, once this rank is known to belong to rank 0's run.

    Otherwise ranks of two runs that share a port would form one run, and train what neither was asked to. Raises
    RankIdentityError on the rank that belongs to another run; the run that it met goes on.
    """
    place = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
    store, rank, size = _open(place, timeout)
    store.set_timeout(timeout)
    token = run_token()
    try:
        theirs = (store.compare_set(_RUN, "", token) if rank == 0 else store.get(_RUN)).decode(errors="replace")
    except dist.DistStoreError as error:
        raise RankIdentityError(
            f"rank {rank}: at {place} no rank 0 of lowrank_dist answered within {timeout.total_seconds():.0f} s; "
            f"{_REMEDY}, and use one version of lowrank_dist on all ranks"
        ) from error
    if theirs != token:
        raise RankIdentityError(
            f"rank {rank} met another run at {place}: this rank belongs to {token}, and the run there is {theirs}; "
            f"{_REMEDY}, and start all ranks with the same launcher"
        )
    if store.add(f"{_RUN}/{rank}", 1) > 1:
        raise RankIdentityError(f"RANK: another process at {place} is also rank {rank}; give every rank its own RANK")
    return store, rank, size


def _open(place: str, timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the job's store, this rank and the number of ranks. Rank 0 opens the store unless its launcher has."""
    try:
        return next(iter(rendezvous("env://", timeout=timeout)))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise RankIdentityError(f"rank 0 cannot listen at {place}, which is already in use; {_REMEDY}") from error
