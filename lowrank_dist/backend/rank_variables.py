"""Checks of the variables by which a launcher tells a rank its place in the job. Needs only the standard library."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lowrank_dist.errors import RankIdentityError, UserError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HIGHEST_PORT = 65535
_SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
# Variables that differ between the ranks of a node. The others are the same for all of them.
_OWN = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID")
_LAUNCHERS = "start the ranks with deepspeed, torchrun or srun"


def number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    """Return the number in a launcher's variable.

    Raises UserError where it is not a number, RankIdentityError for a variable of this rank alone.
    """
    text = environment.get(name, default)
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise (RankIdentityError if name in _OWN else UserError)(
            f"{name}: {text[:40]!r} is not a number; {_LAUNCHERS}, or set RANK, "
            "WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    return int(text)


def check_rank_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError for a variable that is set and wrong. Raises RankIdentityError for one of this rank alone."""
    for name in ("RANK", "LOCAL_RANK", *_SIZES):
        if name in environment:
            number(environment, name)
    for name in _SIZES:
        if name in environment and int(environment[name]) == 0:
            raise UserError(f"{name}: 0 ranks; give the number of ranks, or {_LAUNCHERS}")
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_SIZE")):
        if name in environment and size in environment and int(environment[name]) >= int(environment[size]):
            raise RankIdentityError(
                f"{name}: {environment[name]} must be below {size}={environment[size]}; {_LAUNCHERS}"
            )
    if "MASTER_PORT" in environment and not 0 < number(environment, "MASTER_PORT") <= HIGHEST_PORT:
        raise UserError(
            f"MASTER_PORT: {environment['MASTER_PORT'][:40]} is not a port; give a free one of rank 0's node, from "
            f"1024 to {HIGHEST_PORT}, the same on all ranks"
        )
    if not environment.get("MASTER_ADDR", "unset").strip():
        raise UserError("MASTER_ADDR: empty; set it to the name or the address of rank 0's node, the same on all ranks")


def require_place(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError unless a launcher has set this rank's number, the number of ranks and where they meet."""
    missing = [name for name in NEEDED if name not in environment]
    if not missing:
        return
    absent = f"{', '.join(missing)} not set"
    if "RANK" in missing:
        raise UserError(
            f"{absent}, because launch/train.py was started without a launcher; start it with "
            "`deepspeed --num_gpus N launch/train.py CONFIG`, torchrun or srun"
        )
    raise UserError(
        f"{absent}, although RANK={environment['RANK']} is; {_LAUNCHERS}, which set all of them, or unset RANK if an "
        "earlier shell has left it"
    )
