"""The plan (lowrank_dist/planner) of the run that is about to start: its layout, memory of a rank, FLOPs of a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch.distributed as dist

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.model_files import stored_dtype
from lowrank_dist.backend.limits import MemoryBound, memory_bound
from lowrank_dist.backend.node import node_id, node_names
from lowrank_dist.backend.select import Backend
from lowrank_dist.config import Config
from lowrank_dist.engine.planning import Model, Request, auto_tensor, fixed_of, job_of
from lowrank_dist.errors import UserError
from lowrank_dist.methods.registry import method_package
from lowrank_dist.model.load import check_model
from lowrank_dist.parallel.collectives import gather_texts
from lowrank_dist.planner.choice import fitting_layout
from lowrank_dist.planner.flops import square_lengths_of, step_flops
from lowrank_dist.planner.hardware import GPUS, gpu_called, peak_flops
from lowrank_dist.planner.job import Layout
from lowrank_dist.planner.layouts import Cluster
from lowrank_dist.planner.memory import memory
from lowrank_dist.planner.parameters import heaviest_rank, host_bytes

# A run does not start if its planned memory exceeds this factor times the available. Tests hold the plan to 10 %.
_CERTAIN = 1.1
_GIB = 2**30


def with_tensor_size(config: Config, backend: Backend) -> tuple[Config, str | None]:
    """Return the config with a size for parallel.tensor=auto, and the line that reports the size. Collective.

    The plan chooses the size for the hosts of all ranks and the smallest memory among them. All ranks use rank 0's
    choice. Raises UserError on every rank if a rank finds no size.
    """
    if config.parallel.tensor != "auto":
        return config, None
    world = dist.group.WORLD
    assert world is not None, "the ranks have met"
    own = f"{backend.memory_for_a_rank()} {node_id()}"
    told = [text.split(" ", 1) for text in gather_texts(own, world, backend.device)]
    memory, hosts = min(int(size) for size, _ in told), node_names([identity for _, identity in told])
    limits = gather_texts(_limit_text(backend.memory_limit()), world, backend.device)
    try:
        found = str(auto_tensor(_request_of_run(config, backend), cluster_of_ranks(hosts, memory, backend)))
    except UserError as error:
        found = str(error)
    answers = gather_texts(found, world, backend.device)
    refused = [answer for answer in answers if not answer.isdecimal()]
    if refused:
        raise UserError(refused[0])
    size, count = int(answers[0]), len(set(hosts))
    where = f"{len(hosts)} rank{'s' * (len(hosts) > 1)} on {count} host{'s' * (count > 1)}"
    limit = next(text for text, (bytes_of_rank, _) in zip(limits, told, strict=True) if int(bytes_of_rank) == memory)
    line = f"parallel.tensor=auto: {size}, the plan's choice for {where} with {memory / _GIB:.2f} GiB for a rank{limit}"
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"tensor": size})}), line


def _limit_text(limit: MemoryBound | None) -> str:
    """Return the text on a limit that follows a figure of memory."""
    return f" ({limit})" if limit is not None else ""


def _request_of_run(config: Config, backend: Backend) -> Request:
    """Return the request for the plan of a run before its ranks are grouped.

    The method's section is completed by the adapter that training starts from. A resumed run has its values in the
    checkpoint, which is not read yet; if that adapter is gone, the section's defaults are used.
    """
    path, section = config.model.path, config.own_section
    architecture = check_model(path, 1, config.data.max_length)
    if section.starts_from is not None and section.starts_from.is_dir():
        config = config.with_own_section(method_package(config.method).files.complete(section, path))
    device = {"device": "cpu" if backend.device.type == "cpu" else "cuda"}
    config = config.model_copy(update={"model": config.model.model_copy(update=device)})
    return Request(Model(path.name, architecture, stored_dtype(path) or "fp32"), config, True)


def cluster_of_ranks(hosts: Sequence[str], memory: int, backend: Backend) -> Cluster:
    """Return the cluster of a run. hosts: of every rank, in order. memory: bytes that each of them may take.

    A node of the cluster has the greatest common divisor of the hosts' rank counts, so that a group inside a node lies
    on one host. A device with unknown rates, such as a CPU, gets those of an H100; they only serve to compare layouts.
    """
    ranks = math.gcd(*Counter(hosts).values())
    gpu = gpu_called(backend.name()) or GPUS["h100"]
    return Cluster(len(hosts) // ranks, ranks, gpu, memory, memory if backend.device.type == "cpu" else None)


class Ranks(Protocol):
    """The attributes of a run's ranks that the plan reads: those of a Topology, or of what doctor knows without one."""

    @property
    def tp_size(self) -> int: ...

    @property
    def dp_size(self) -> int: ...

    @property
    def sequence_parallel(self) -> bool: ...

    @property
    def hosts(self) -> Sequence[str]: ...


class Forecast:
    """The plan of one run as it was launched.

    memory_line: the line on memory that the run prints. lacks_host_memory: whether that line warns that the ranks of a
    node need more host memory than it has. layout_line: the line on a layout that the plan chose, or None.
    """

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        topology: Ranks,
        backend: Backend,
        layout_line: str | None = None,
    ) -> None:
        """Raises UserError if planned memory exceeds the available memory by over 10 %, unless train.ignore_plan."""
        self.layout_line = layout_line
        path = config.model.path
        request = Request(Model(path.name, architecture, stored_dtype(path) or "fp32"), config, True)
        self._fixed, self._hosts = fixed_of(request), topology.hosts
        train, self._recompute = config.train, config.engine.recompute == "full"
        layout = Layout(
            topology.tp_size, topology.dp_size, topology.sequence_parallel, train.micro_batch, self._recompute
        )
        job = replace(
            job_of(request, target_share=1.0), layout=layout, device="cpu" if backend.device.type == "cpu" else "cuda"
        )
        self._job, self._ignored = job, train.ignore_plan
        self._planned = memory(job, heaviest_rank(job))
        self._backend, self._before_model = backend, backend.peak_memory_gib()
        lacking = self._lack_of_host_memory()
        self.memory_line, self.lacks_host_memory = self._check() + lacking, bool(lacking)

    def _check(self) -> str:
        """Return the line on memory. Raises as `__init__` does."""
        planned, available = self._planned.total, self._backend.memory_for_a_rank()
        fullest = sorted(self._planned.parts.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in fullest if size)
        limit = _limit_text(self._backend.memory_limit())
        line = f"planned memory {planned / _GIB:.2f} GiB a rank ({parts}) of {available / _GIB:.2f} GiB{limit}"
        if planned <= available:
            return line
        if planned <= _CERTAIN * available or self._ignored:
            return f"{line}: IT MAY NOT FIT"
        raise UserError(
            f"{line}: it does not fit. {self._remedy(available)}; `lowrank-dist plan` with this configuration shows "
            "why, and train.ignore_plan=true starts it anyway"
        )

    def _lack_of_host_memory(self) -> str:
        """Return a warning where a node's ranks need more host memory than is allowed here, to follow the memory line.

        On a CPU the memory of the ranks is the node's, which `_check` covers.
        """
        if self._backend.device.type == "cpu":
            return ""
        ranks = max(Counter(self._hosts).values())
        needed, bound = host_bytes(self._job, ranks), memory_bound()
        if needed <= bound.limit:
            return ""
        return (
            f"; host memory: {ranks} ranks of a node need {needed / _GIB:.2f} GiB while they load, and this node has "
            f"{bound.limit / _GIB:.2f} GiB for them ({bound.source}): THE KERNEL MAY END THEM; more is given by "
            f"{bound.remedy or 'nodes with more memory'}"
        )

    def _remedy(self, available: int) -> str:
        """Return the layout with which the run fits its ranks; where none fits, changes that need less memory."""
        cluster = cluster_of_ranks(self._hosts, available, self._backend)
        found = fitting_layout(self._job, self._fixed, cluster)
        if found is not None:
            return f"On these {cluster.gpus} ranks it fits with {found} ({found.candidate.job.layout})"
        limit = self._backend.memory_limit()
        raised = f", or raise the limit ({limit.remedy})" if limit is not None else ""
        return (
            f"No layout of these {cluster.gpus} ranks fits; use more ranks, or a smaller data.max_length or "
            f"eval.generate.batch{raised}"
        )

    def compare(self, measured: float) -> str:
        """Return a line with the measured peak, in GiB, beside the planned one."""
        planned = f"planned {self._planned.total / _GIB:.2f} GiB"
        if self._backend.device.type == "cuda":
            return f"peak memory of a rank {measured:.2f} GiB; {planned}"
        return (
            f"peak memory of a rank {measured:.2f} GiB, the whole process with Python and its libraries "
            f"({self._before_model:.2f} GiB before the model was loaded); {planned} for tensors alone"
        )

    def flops(self, tokens: int, targets: int, lengths: Mapping[int, int]) -> int:
        """Return the FLOPs that model and method need for the given tokens, over all ranks (MFU's numerator).

        lengths: length of samples → their number. tokens and lengths include virtual tokens, but not the positions of
        a prefix. Costs of a microbatch that do not depend on its tokens are left out.
        """
        count = step_flops(
            self._job.architecture,
            self._job.footprint,
            tokens=tokens,
            target_tokens=targets,
            square_lengths=square_lengths_of(lengths, self._job.architecture),
            recompute=self._recompute,
        )
        return count.model

    def peak(self) -> float | None:
        """Return the FLOP/s of a rank's device by its data sheet; None where it is not known."""
        return peak_flops(self._backend.name())
