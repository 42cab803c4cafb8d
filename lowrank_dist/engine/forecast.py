"""The plan (lowrank_dist/plan) of the run that is about to start: memory of a rank and FLOPs of a step."""

from __future__ import annotations

from dataclasses import replace

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.model_files import stored_dtype
from lowrank_dist.backend.select import Backend
from lowrank_dist.config import Config
from lowrank_dist.engine.planning import Model, Request, job_of
from lowrank_dist.errors import UserError
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.plan.flops import step_flops
from lowrank_dist.plan.hardware import peak_flops
from lowrank_dist.plan.job import Layout
from lowrank_dist.plan.memory import memory
from lowrank_dist.plan.parameters import heaviest_rank

# A run whose planned memory exceeds the available by this factor does not start. Tests hold the plan to 10 %.
_CERTAIN = 1.1
_GIB = 2**30


class Forecast:
    """The plan of one run as it was launched. memory_line: the line on memory that the run prints."""

    def __init__(self, config: Config, architecture: Architecture, topology: Topology, backend: Backend) -> None:
        """Raises UserError where planned memory exceeds the available by over 10 %, unless train.ignore_plan is set."""
        path = config.model.path
        request = Request(Model(path.name, architecture, stored_dtype(path) or "fp32"), config, True)
        train, self._recompute = config.train, config.engine.recompute == "full"
        layout = Layout(
            topology.tp_size, topology.dp_size, topology.sequence_parallel, train.micro_batch, self._recompute
        )
        job = replace(
            job_of(request, target_share=1.0), layout=layout, device="cpu" if backend.device.type == "cpu" else "cuda"
        )
        self._job, self._ignored = job, train.ignore_plan
        self._planned = memory(job, heaviest_rank(job))
        self._backend = backend
        self.memory_line = self._check()

    def _check(self) -> str:
        """Return the line on memory. Raises as `__init__` does."""
        planned, available = self._planned.total, self._backend.memory_for_a_rank()
        fullest = sorted(self._planned.parts.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in fullest if size)
        line = f"planned memory {planned / _GIB:.2f} GiB a rank ({parts}) of {available / _GIB:.2f} GiB"
        if planned <= available:
            return line
        if planned <= _CERTAIN * available or self._ignored:
            return f"{line}: IT MAY NOT FIT"
        raise UserError(
            f"{line}: it does not fit. `lowrank-dist plan` with this configuration says what would; a smaller "
            "train.micro_batch, eval.generate.batch or data.max_length, engine.recompute=full or a larger "
            "parallel.tensor need less. train.ignore_plan=true starts it anyway"
        )

    def compare(self, measured: float) -> str:
        """Return a line with the measured peak, in GiB, beside the planned one."""
        beside = "" if self._backend.device.type == "cuda" else ", Python and its libraries not counted"
        return f"peak memory of a rank {measured:.2f} GiB; planned {self._planned.total / _GIB:.2f} GiB{beside}"

    def flops(self, tokens: int, targets: int, squares: int) -> int:
        """Return the FLOPs that model and method need for so many tokens, over all ranks (MFU's numerator).

        tokens and squares count virtual positions that are tokens of a row, and no others. Costs of a microbatch that
        do not depend on its tokens are left out.
        """
        count = step_flops(
            self._job.architecture,
            self._job.footprint,
            tokens=tokens,
            target_tokens=targets,
            square_lengths=squares,
            recompute=self._recompute,
        )
        return count.model

    def peak(self) -> float | None:
        """Return the FLOP/s of a rank's device by its data sheet; None where it is not known."""
        return peak_flops(self._backend.name())
