"""The ranks of a command that decodes: those of a launcher, or this process alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from lowrank_dist.backend import select
from lowrank_dist.backend.select import Backend
from lowrank_dist.errors import UserError
from lowrank_dist.parallel.topology import Topology

# Data-parallel ranks meet at the end of a command alone, and one may have decoded for hours when another is done.
_TIMEOUT_SECONDS = 24 * 3600
_USER_ERROR = 2


@dataclass(frozen=True)
class Session:
    """speaks: whether this is the rank that prints and writes."""

    topology: Topology
    backend: Backend
    speaks: bool


@contextmanager
def session(tensor: int, device: str) -> Iterator[Session]:
    """Join the launcher's job, or be one alone, at tensor-parallel size `tensor`; further ranks are data parallel.

    device: auto, cpu or cuda. Of ranks that meet the same UserError the first raises it, and the others leave with its
    exit code.
    """
    launched, clean = "RANK" in os.environ, False
    if tensor > 1 and not launched:
        raise UserError(
            f"--tensor {tensor} needs {tensor} ranks, and this process was started alone: "
            f"`torchrun --nproc-per-node {tensor} -m lowrank_dist.cli COMMAND … --tensor {tensor}`"
        )
    try:
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {device}: give auto, cpu or cuda")
        backend = select.select_backend(device, *select.local_rank_and_size())
        if launched:
            select.init_process_group(backend, _TIMEOUT_SECONDS)
        elif not dist.is_initialized():
            dist.init_process_group(backend.collective, store=dist.HashStore(), rank=0, world_size=1)
        # Decoding works on whole sequences: none is cut over ranks.
        topology = Topology.build(tensor, None, False, _TIMEOUT_SECONDS)
        yield Session(topology, backend, speaks=topology.world_group.rank() == 0)
        clean = True
    except UserError:
        if launched and not _is_first_to_fail():
            sys.exit(_USER_ERROR)
        raise
    finally:
        select.shutdown(clean=clean or not launched)


def _is_first_to_fail() -> bool:
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("lowrank_dist/decoding_failed", 1) == 1
    except RuntimeError:  # the rank that held the store is gone: better twice than never
        return True
