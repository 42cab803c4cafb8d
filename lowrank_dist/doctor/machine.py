"""Checks of a node's hardware and compute libraries: GPUs, memory, temporary folder, compiled operators."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_dist.backend.exhaustion import ENOUGH_FILES, SHARED_MEMORY, SHARED_MEMORY_REMEDY, open_files_remedy
from lowrank_dist.backend.limits import cpu_bound, machine_memory, memory_bound
from lowrank_dist.doctor.rows import Row, format_size, one_line

if TYPE_CHECKING:
    import torch

    from lowrank_dist.backend.devices import Gpu

# NCCL takes about 10 MB of /dev/shm for each pair of ranks of a node; containers have 64 MB by default.
ENOUGH_SHARED = 512 * 2**20
# A GPU with less than this share of its memory free is in use by other processes.
FREE_SHARE = 0.9


def devices() -> list[Row]:
    """Return rows on the GPUs, their driver, and NCCL."""
    from lowrank_dist.backend.devices import driver, gpus, nccl

    rows = []
    try:
        found = gpus()
        rows.append(Row("GPUs", "ok", str(len(found)), alike=str(len(found)), if_unlike="warning"))
        rows += [_gpu(f"GPU {index}", gpu) for index, gpu in enumerate(found)]
    except RuntimeError as error:
        remedy = "GPUs need a CUDA build of torch and a matching driver, and CUDA_VISIBLE_DEVICES must not hide them"
        detail = f"{one_line(str(error))}, so training runs on the CPU; {remedy}"
        rows.append(Row("GPUs", "off", detail, alike="none", if_unlike="warning"))
    if (version := driver()) is not None:
        rows.append(Row("GPU driver", "ok", version, version, "warning"))
    version = nccl()
    rows.append(
        Row("NCCL", "ok", version, version)
        if version
        else Row("NCCL", "off", "this torch has none, so ranks use gloo; CUDA builds of torch have NCCL")
    )
    return rows


def gpu_in_use(rank: int, device: torch.device) -> list[Row]:
    """Return a row on a rank's GPU if other processes use it: the rank that checks the node may not see that GPU."""
    from lowrank_dist.backend.devices import gpu

    found = [_gpu(f"GPU of rank {rank}", gpu(device.index))] if device.type == "cuda" else []
    return [replace(row, alike=None) for row in found if row.state != "ok"]


def _gpu(what: str, gpu: Gpu) -> Row:
    detail = f"{gpu.name}, {format_size(gpu.total)}, {gpu.architecture}"
    figures = {"total_bytes": gpu.total, "free_bytes": gpu.free}
    if gpu.free >= FREE_SHARE * gpu.total:
        return Row(what, "ok", f"{detail}, {format_size(gpu.free)} free", detail, "warning", figures)
    taken = f"{detail}, but only {format_size(gpu.free)} free; find the process to end with `nvidia-smi`"
    return Row(what, "warning", taken, detail, "warning", figures)


def memory() -> list[Row]:
    """Return a row on host memory: what is available to this process, of how much, and the limit that sets it."""
    total, bound = machine_memory().limit, memory_bound()
    limit = f", limited to {format_size(bound.limit)} by {bound.source}" if bound.remedy else ""
    figures = {"total_bytes": total, "available_bytes": bound.available}
    detail = f"{format_size(bound.available)} available of {format_size(total)}{limit}"
    return [Row("host memory", "ok", detail, figures=figures)]


def cpus() -> list[Row]:
    """Return a row on the CPUs that this process may use."""
    bound, everywhere = cpu_bound(), os.cpu_count() or 1
    limit = f" of {everywhere}, limited by {bound.source}" if bound.source else ""
    return [Row("CPUs", "ok", f"{bound.count} usable{limit}", figures={"cpus": bound.count})]


def shared_memory(gpus: bool, place: Path = SHARED_MEMORY) -> list[Row]:
    """Return a row on /dev/shm, through which NCCL's ranks of one node communicate."""
    what = str(SHARED_MEMORY)
    if not place.is_dir():
        absent = "missing, but NCCL needs it; mount a tmpfs, or give the container one"
        return [Row(what, "warning", f"{absent}: {SHARED_MEMORY_REMEDY}")]
    facts = os.statvfs(place)
    size, free = facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize
    figures = {"total_bytes": size, "free_bytes": free}
    if gpus and free < ENOUGH_SHARED:
        short = f"{format_size(free)} free of {format_size(size)}: too little for the NCCL ranks of a node"
        return [Row(what, "warning", f"{short}; {SHARED_MEMORY_REMEDY}", figures=figures)]
    return [Row(what, "ok", f"{format_size(free)} free of {format_size(size)}", figures=figures)]


def temporary_files() -> list[Row]:
    """Return a row on the folder for temporary files, which a run can do without."""
    from lowrank_dist.backend.libraries import temporary_folder

    what, found = "temporary folder", temporary_folder()
    if found is None:
        detail = (
            "none of TMPDIR, /tmp, /var/tmp and the working folder can be written. A run needs none, but torchrun does "
            "not start, no extension can be built, and loss.png is drawn only where MPLCONFIGDIR can be written; set "
            "TMPDIR to a writable folder"
        )
        return [Row(what, "warning", detail)]
    asked = os.environ.get("TMPDIR")
    if asked and os.path.realpath(asked) != os.path.realpath(found):
        reason = "is full or cannot be written" if os.path.isdir(asked) else "is not a folder"
        detail = f"TMPDIR={asked} {reason}, so {found} is used; set TMPDIR to a writable folder, or unset it"
        return [Row(what, "warning", detail)]
    facts = os.statvfs(found)
    free = facts.f_bavail * facts.f_frsize
    return [Row(what, "ok", f"{found}: {format_size(free)} free", figures={"free_bytes": free})]


def open_files() -> list[Row]:
    """Return a row on the limit on open files and connections of a process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = limit != resource.RLIM_INFINITY and limit < ENOUGH_FILES
    said = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} in a process (`ulimit -n`)"
    if few:
        return [Row("open files", "warning", f"few for a job of many ranks: {open_files_remedy()}")]
    return [Row("open files", "ok", said)]


def operators() -> Iterator[Row]:
    """Yield rows on the compiled operators of both devices, and on the instruction set of the CPU operators."""
    from lowrank_dist.ops.extension import (
        CUDA_LIBRARY,
        LIBRARY,
        cpu_capability,
        reason_not_loaded,
        reason_not_loaded_cuda,
    )

    for device, reason, library in (
        ("CPU", reason_not_loaded(), LIBRARY),
        ("CUDA", reason_not_loaded_cuda(), CUDA_LIBRARY),
    ):
        what = f"compiled {device} operators"
        if reason is not None:
            yield Row(what, "off", reason, "none", "warning")
            continue
        build = hashlib.sha256(library.read_bytes()).hexdigest()[:12]
        # A warning: two builds of the same sources need not be the same bytes, and own_sources compares the sources.
        yield Row(what, "ok", f"{library}, build {build}", f"build {build}", "warning")
    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    asked = f", as ATEN_CPU_CAPABILITY={limit} asks" if limit else ""
    used = (cpu_capability() or "PyTorch's own choice") + asked
    yield Row("CPU instruction set", "ok", used, used, "warning")


def products() -> list[Row]:
    """Return a row on the library that multiplies with frozen fp32 weights on a CPU (ops/linear.py)."""
    import torch

    what = "frozen fp32 GEMM on CPU"
    if torch.backends.mkldnn.is_available():
        return [Row(what, "ok", "oneDNN")]
    return [Row(what, "off", "torch.mm: this build of torch has no oneDNN; PyTorch's own builds have it")]


def apex() -> list[Row]:
    """Return a row on apex."""
    from lowrank_dist.backend.apex import find_apex

    found = find_apex()
    return [Row("apex", "ok" if found.usable else "off", found.reason)]
