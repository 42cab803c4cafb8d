"""The footprint of low-rank updates: factors A [r, in] and B [out, r] of every target. No torch.

Weight-decomposed updates (DoRA) have a magnitude for every adapted output row as well (parallel/decomposed.py).

Legend: O outputs and K inputs of a linear, R = Σ r of its factors, Z its output before scaling, Y = g ⊙ Z + bias its
output, U the product of its input with A.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.placement import LinearPlacement, LoraRules, place_factors
from lowrank_dist.arch.rows import Linear
from lowrank_dist.errors import UserError
from lowrank_dist.methods.lora.config import LoraConfig
from lowrank_dist.methods.registry import Sizes
from lowrank_dist.planner.activations import widths
from lowrank_dist.planner.factors import Factor, Layer, low_rank, on_every_linear, total_rank
from lowrank_dist.planner.job import Call, Footprint, Job, Moment, Parameters
from lowrank_dist.planner.traffic import REDUCE
from lowrank_dist.sections.section import MethodName

# parallel/decomposed.py: number of elements of a weight or of outputs that are processed at a time in fp32.
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class LowRank(Footprint):
    """The footprint of plain factors, which `Footprint` counts for any method."""

    def parts(self, architecture: Architecture) -> dict[str, int]:
        """Return the number of trained elements by the name of the adapted module."""
        return self.placement.by_module()


@dataclass(frozen=True)
class Decomposed(LowRank):
    """The footprint of factors and a magnitude for every output row that has factors (DoRA).

    Not counted: the FLOPs of the norms (2·R·O·K per linear and step; those of AdamW are not counted either), and the
    norms' two chunks of a weight, which exist only after gradients and activations are freed.
    """

    trains_row_scales: ClassVar[bool] = True

    def label(self, job: Job) -> str:
        return "DoRA"

    @property
    def output_passes(self) -> int:
        """6: Y = g ⊙ Z and dZ = g ⊙ dY each read one such tensor and write one, and dm reads two."""
        return 6

    def step_passes(self, job: Job) -> int:
        """Return the bytes to compute the norms: W is cast, copied, added to s·B·A, squared and summed."""
        cast = job.itemsize + 4 if job.itemsize < 4 else 0
        weights = sum(count * linear.weights for linear, _, count in self._adapted())
        return (cast + (2 + 2 + 2 + 1) * 4) * weights // job.layout.tensor

    def parameters(self, architecture: Architecture) -> Parameters:
        """Return (in + out)·r + out per factor."""
        count = sum(self.parts(architecture).values())
        return Parameters(count, count)

    def parts(self, architecture: Architecture) -> dict[str, int]:
        found = super().parts(architecture)
        for _, factors, count in self._adapted():
            for factor in factors:
                found[factor.name] += count * factor.rows
        return found

    def buffers(self, job: Job, rows: int) -> int:
        """Return the bytes of the adapted rows' indices (int64) and norms (fp32), and of g of every output (fp32).

        g = m / norm is the scale of an output (parallel/decomposed.py).
        """
        return (8 + 4) * rows + 4 * sum(count * _outputs(job, linear) for linear, _, count in self._adapted())

    def saved_behind_linear(self, job: Job, linear: Linear, factors: Sequence[Factor]) -> int:
        """Return the bytes of Z. A row-parallel linear under sequence parallelism saves the received [Z ∣ U]."""
        if not factors:
            return 0
        if linear.kind == "row" and job.sequence_parallel:
            return job.shard_tokens * (linear.out_features + total_rank(factors)) * job.itemsize
        return job.tokens * _outputs(job, linear) * job.itemsize

    def backward_moments(self, job: Job, top: Layer, kept: int) -> Sequence[Moment]:
        """Return the moments when the magnitudes of fc2 and fc1 run backward: dY, dZ and their fp32 chunks.

        fc1's follows the backward of the activation function.
        """
        fc1, fc2 = (top.kind.linears[name] for name in ("linear_fc1", "linear_fc2"))
        on_fc2 = top.on("linear_fc2")
        residual = job.shard_tokens * job.architecture.hidden * job.itemsize
        inner = job.tokens * top.kind.ffn // job.layout.tensor * job.itemsize
        found = []
        if on_fc2:
            working = _rescaling(job, job.shard_tokens * _outputs(job, fc2))
            found.append(Moment("backward of fc2's magnitudes", {"activations": kept, "working memory": working}))
        if top.on("linear_fc1"):
            freed = widths(job) * inner + (inner if on_fc2 else 0)
            freed += 0 if job.sequence_parallel else self.saved_behind_linear(job, fc2, on_fc2)
            working = residual + _rescaling(job, job.tokens * _outputs(job, fc1))
            parts = {"activations": kept - freed, "working memory": working}
            found.append(Moment("backward of fc1's magnitudes", parts))
        return found

    def evaluation_working(self, job: Job, residual: int) -> int:
        """Return the bytes of fc1's Z and Y, the embeddings, the inputs of layer and MLP, and the MLP's norm."""
        adapted = (layer.kind for layer, _, _ in self.placement.kinds if layer.on("linear_fc1"))
        widest = max((_outputs(job, kind.linears["linear_fc1"]) for kind in adapted), default=0)
        return 4 * residual + 2 * widest * residual // job.architecture.hidden

    def step_calls(self, job: Job) -> Sequence[Call]:
        """Return one all-reduce for the squared row norms of all row-parallel linears, whose columns are sharded."""
        row_parallel = ((factors, count) for linear, factors, count in self._adapted() if linear.kind == "row")
        rows = sum(count * factor.rows for factors, count in row_parallel for factor in factors)
        return [(REDUCE, 4 * rows)] if rows else []

    def _adapted(self) -> Iterator[tuple[Linear, tuple[Factor, ...], int]]:
        """Yield each distinct linear with factors, its factors, and how many layers have it."""
        for layer, _, count in self.placement.kinds:
            for linear, factors in layer.linears:
                if factors:
                    yield linear, factors, count


def _outputs(job: Job, linear: Linear) -> int:
    """Return O on a rank."""
    return linear.local_shape(job.layout.tensor)[0]


def _rescaling(job: Job, outputs: int) -> int:
    """Return the bytes of backward through g: dY and dZ (`outputs` elements each), fp32 chunks of dY and of dY ⊙ Z."""
    chunks = 1 if job.itemsize == 4 else 2
    return 2 * outputs * job.itemsize + chunks * 4 * min(outputs, _CHUNK_ELEMENTS)


def placement_rules(section: LoraConfig) -> LoraRules:
    """Return the keys of the section that `place_factors` uses."""
    return LoraRules(
        section.rank, section.alpha, section.targets, section.rslora, section.rank_pattern, section.alpha_pattern
    )


def refuse_parts(placements: Sequence[LinearPlacement]) -> None:
    """Raise UserError for a target that is only a part of a module: an adapter file has magnitudes of whole modules."""
    for placement in placements:
        for spec in placement.factors:
            covered = sum(other.rows for other in placement.factors if other.export_path == spec.export_path)
            if covered < spec.export_rows:
                raise UserError(
                    f"lora.dora: {spec.path} is a part of {spec.export_path}, and a DoRA adapter needs all of its "
                    f"rows; target {spec.export_path.rpartition('.')[2]}, or all of its parts"
                )


def footprint_of(method: MethodName, section: LoraConfig, architecture: Architecture) -> LowRank:
    """Return the footprint of a run.

    Raises UserError where targets or patterns do not fit the model, and as `refuse_parts` does with dora.
    """
    rules = placement_rules(section)
    if section.dora:
        refuse_parts(place_factors(architecture, rules))
    return (Decomposed if section.dora else LowRank)(method, low_rank(architecture, rules))


def footprints_of_size(method: MethodName, sizes: Sizes, architecture: Architecture, tensor: int) -> list[LowRank]:
    """Return the footprint of factors of rank `sizes.rank` on every linear."""
    return [LowRank(method, on_every_linear(architecture, sizes.rank))]
