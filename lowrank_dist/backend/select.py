"""Device, collective library and memory readings of this process: everything that differs between CPU and CUDA."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from lowrank_dist.backend import megatron, sharing
from lowrank_dist.backend.devices import device_of_rank, synchronize
from lowrank_dist.backend.limits import MemoryBound, memory_bound
from lowrank_dist.backend.rank_variables import require_place
from lowrank_dist.backend.reach import require_reach
from lowrank_dist.backend.rendezvous import meet
from lowrank_dist.errors import UserError
from lowrank_dist.terminal import say


@dataclass(frozen=True)
class Backend:
    """The chosen device. collective: its backend in torch.distributed; accelerator: its name in DeepSpeed.

    ranks_per_device: the number of ranks that share the device; on CPUs, the node's memory. It and the collective are
    those of a process alone until `init_process_group` knows the other ranks. requested: auto, cpu or cuda.
    """

    device: torch.device
    collective: str
    accelerator: str
    ranks_per_device: int = 1
    requested: str = "auto"

    def peak_memory_gib(self) -> float:
        """Return the peak memory so far in GiB: allocated on the GPU, or resident in this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        with open("/proc/self/status", errors="replace") as status:
            kib = next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), 0)
        return kib / 2**20

    def memory_for_a_rank(self) -> int:
        """Return the bytes that this rank may take: its share of the GPU's memory, or of what the node has left for it.

        Limits of containers, batch systems and ulimit count (`memory_bound`).
        """
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory // self.ranks_per_device
        return memory_bound(self.ranks_per_device).share(self.ranks_per_device)

    def memory_limit(self) -> MemoryBound | None:
        """Return the limit that `memory_for_a_rank` follows; None where that is the memory of the GPU or the node."""
        bound = None if self.device.type == "cuda" else memory_bound(self.ranks_per_device)
        return bound if bound is not None and bound.remedy else None

    def name(self) -> str:
        """Return the name of the device."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.processor() or platform.machine()} CPU"

    def synchronize(self) -> None:
        """Wait for queued device work, so that a clock read afterwards includes it."""
        synchronize(self.device)

    def describe(self) -> str:
        if self.device.type == "cuda":
            return f"{self.name()}, {self.collective}"
        threads = torch.get_num_threads()
        return f"{self.name()}, {threads} {'thread' if threads == 1 else 'threads'}, {self.collective}"


def local_rank() -> int:
    """Return this rank's number on its node, from the launcher; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Return the number of ranks of this node, from the launcher; 1 without one.

    torchrun sets LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def select_backend(requested: str, local_rank: int = 0) -> Backend:
    """Choose the device of this rank (`device_of_rank`), and prepare Megatron and DeepSpeed for it.

    Raises UserError where this process is alone, "cuda" is requested and torch sees no CUDA device. Ranks of a job
    find this when they meet, since the error depends on what the others see.
    """
    if requested == "cuda" and not torch.cuda.is_available() and os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError(sharing.NO_CUDA)
    device = device_of_rank(requested, local_rank)
    collective = "nccl" if device.type == "cuda" else "gloo"
    backend = Backend(device, collective, device.type, requested=requested)
    # DeepSpeed picks its accelerator at import from this variable; it must be the device that Megatron uses.
    os.environ["DS_ACCELERATOR"] = backend.accelerator
    megatron.prepare(backend.device)
    return backend


def init_process_group(backend: Backend, timeout_seconds: int) -> Backend:
    """Join the job that the launcher described in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Returns the backend with the collective library of all ranks and the number of ranks that share its device. Rank 0
    prints which ranks share a GPU. Raises UserError where a variable is not set, or where only some ranks have a GPU,
    and RankIdentityError where the ranks there belong to another run.
    """
    require_place()
    # Without device_id: with it NCCL would at once split off a communicator for each of the twenty-odd groups that
    # Megatron makes, most of them of one rank, and a job of one rank can fail in that split (DeepSpeed issue 8248).
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = meet(timeout, nccl=backend.collective == "nccl")
    shared = sharing.agree(store, rank, size, sharing.claim(backend.requested, backend.device), timeout)
    for line in shared.notes if rank == 0 else ():
        say(line, err=True)
    backend = replace(backend, collective=shared.collective, ranks_per_device=shared.ranks_per_device[rank])
    try:
        dist.init_process_group(
            backend.collective, store=dist.PrefixStore("default_pg", store), rank=rank, world_size=size, timeout=timeout
        )
    except RuntimeError:
        require_reach(store, rank, size, os.environ["MASTER_ADDR"])
        raise
    set_local_rank_to_device(backend)
    return backend


def set_local_rank_to_device(backend: Backend) -> None:
    """Set LOCAL_RANK to the number of this rank's GPU; on a CPU it is set only where the launcher has not.

    DeepSpeed's engine refuses to start without it and calls torch.cuda.set_device(LOCAL_RANK), which fails or moves the
    rank where several ranks share a GPU. This runs after the ranks have met: until then LOCAL_RANK decides which rank
    reports for its node.
    """
    if backend.device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(backend.device.index)
    else:
        os.environ.setdefault("LOCAL_RANK", str(local_rank()))


def shutdown(*, clean: bool) -> None:
    """Leave the job.

    After a clean run all ranks leave together and destroy the groups; otherwise the interpreter may abort at exit.
    """
    if clean and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
