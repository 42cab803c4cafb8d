"""The plan of the run that is about to start (lowrank_dist/plan): memory of a rank, and work of a step."""

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

# Beyond this share of what there is, a run does not start: the plan is not that far off (tests hold it to 10 %).
_CERTAIN = 1.1
_GIB = 2**30


class Forecast:
    """The plan of one run as it was launched. memory_line: what it says of memory."""

    def __init__(self, config: Config, architecture: Architecture, topology: Topology, backend: Backend) -> None:
        """Raises UserError where the run does not fit the device by far, unless train.ignore_plan."""
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
        """One line on memory."""
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
        """One line on the measured peak, in GiB, beside the plan."""
        beside = "" if self._backend.device.type == "cuda" else ", Python and its libraries not counted"
        return f"peak memory of a rank {measured:.2f} GiB; planned {self._planned.total / _GIB:.2f} GiB{beside}"

    def flops(self, tokens: int, targets: int, squares: int) -> int:
        """FLOPs that model and method need for so many tokens, over all ranks (MFU's numerator).

        Virtual positions that are tokens of a row are among the tokens and their squares, others are not. What a
        microbatch costs whatever its tokens is left out.
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
        """FLOP/s of a rank's device by its data sheet, None where it is not known."""
        return peak_flops(self._backend.name())
