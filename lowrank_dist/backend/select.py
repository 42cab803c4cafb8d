"""Device, collective library and memory readings of this process: everything that differs between CPU and CUDA."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lowrank_dist.backend import megatron
from lowrank_dist.backend.devices import device_of_rank, synchronize
from lowrank_dist.errors import UserError


@dataclass(frozen=True)
class Backend:
    """The chosen side of the seam: `collective` is torch.distributed's name, `accelerator` is DeepSpeed's.

    ranks_per_device: how many ranks of this node share the device, or the node's memory where it is the CPU.
    """

    device: torch.device
    collective: str
    accelerator: str
    ranks_per_device: int = 1

    def peak_memory_gib(self) -> float:
        """Return the peak memory so far: allocated on the GPU, or resident of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        with open("/proc/self/status") as status:
            kib = next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), 0)
        return kib / 2**20

    def memory_for_a_rank(self) -> int:
        """Return the bytes that this rank may take: its share of the GPU's memory, or of what the node has left."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory // self.ranks_per_device
        with open("/proc/meminfo") as lines:
            kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return kib * 1024 // self.ranks_per_device

    def name(self) -> str:
        """Return the name of the device."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.processor() or platform.machine()} CPU"

    def synchronize(self) -> None:
        """Wait for queued device work, so that a clock read afterwards means something."""
        synchronize(self.device)

    def describe(self) -> str:
        threads = "" if self.device.type == "cuda" else f", {torch.get_num_threads()} threads"
        return f"{self.name()}{threads}, {self.collective}"


def local_rank_and_size() -> tuple[int, int]:
    """Return this rank's number on its node and how many ranks the node runs, as the launcher says; (0, 1) without one.

    torchrun says the size in LOCAL_WORLD_SIZE, the deepspeed launcher in LOCAL_SIZE.
    """
    size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return int(os.environ.get("LOCAL_RANK", "0")), int(size)


def select_backend(requested: str, local_rank: int, local_size: int) -> Backend:
    """Choose the device of this rank, as `device_of_rank` says, and let Megatron know.

    Raises UserError where CUDA is demanded and absent.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device: cuda was asked for, but torch sees no CUDA device; use model.device=cpu or auto")
    device, collective = device_of_rank(requested, local_rank, local_size)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    backend = Backend(device, collective, device.type, ranks_per_device=-(-local_size // count))
    # DeepSpeed picks its accelerator at import from this variable; both libraries must be on the same side.
    os.environ["DS_ACCELERATOR"] = backend.accelerator
    megatron.prepare(backend.device)
    return backend


def init_process_group(backend: Backend, timeout_seconds: int) -> None:
    """Join the job that the launcher described in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"launch/train.py runs under a launcher: {', '.join(missing)} not set. "
            "Start it with `deepspeed --num_gpus N launch/train.py CONFIG`, torchrun or srun"
        )
    # Without device_id: with it NCCL would at once split off a communicator for each of the twenty-odd groups that
    # Megatron makes, most of them of one rank, and a job of one rank can fail in that split (DeepSpeed issue 8248).
    dist.init_process_group(backend.collective, timeout=timedelta(seconds=timeout_seconds))
    name_own_device(backend)


def name_own_device(backend: Backend) -> None:
    """Let LOCAL_RANK be the number of this rank's GPU, which is what DeepSpeed's engine takes it for.

    It calls torch.cuda.set_device(LOCAL_RANK), which fails or moves the rank where several ranks share a GPU. Called
    once the ranks have met: until then LOCAL_RANK says which of them speaks for its node.
    """
    if backend.device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(backend.device.index)


def shutdown(*, clean: bool) -> None:
    """Leave the job. After a clean run all ranks leave together, and the groups are destroyed, or the interpreter may
    abort at exit.
    """
    if clean and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
