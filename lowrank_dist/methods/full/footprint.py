"""The footprint of full fine-tuning: the base's weights Φ are trained (equation 1 of Hu et al., "LoRA"). No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.methods.registry import Sizes
from lowrank_dist.planner.factors import placement_without_factors
from lowrank_dist.planner.job import Footprint, Job, Parameter, Parameters, padded_vocab
from lowrank_dist.planner.parameters import frozen_parameters, frozen_size, norm_elements
from lowrank_dist.sections.section import MethodName, MethodSection


@dataclass(frozen=True)
class WholeModel(Footprint):
    """The footprint of every weight, bias, norm and embedding; tied weights count once."""

    trains_base: ClassVar[bool] = True

    def parameters(self, architecture: Architecture) -> Parameters:
        """Return |Φ|."""
        size = frozen_size(architecture)
        return Parameters(size, size)

    def parts(self, architecture: Architecture) -> dict[str, int]:
        """Return |Φ| for each part of the model."""
        return frozen_parameters(architecture)

    def on_rank(self, job: Job) -> Sequence[Parameter]:
        return list(_parameters(job))

    def gathers_embedding_gradient(self, job: Job) -> bool:
        """Return True: the embeddings are trained, so the gradient of their output is gathered."""
        return True


def footprint_of(method: MethodName, section: MethodSection, architecture: Architecture) -> WholeModel:
    return WholeModel(method, placement_without_factors(architecture, None))


def footprints_of_size(method: MethodName, sizes: Sizes, architecture: Architecture, tensor: int) -> list[WholeModel]:
    """Return the footprint; the method has only one size."""
    return [WholeModel(method, placement_without_factors(architecture, None))]


def _parameters(job: Job) -> Iterator[Parameter]:
    """Yield every weight and bias on a rank.

    Under sequence parallelism the gradient of a replicated parameter covers only the rank's tokens, so it is partial.
    The gradient of the q and k norms covers only the rank's heads, with or without sequence parallelism.
    """
    arch, n, sequence = job.architecture, job.layout.tensor, job.sequence_parallel
    norm = [Parameter(arch.hidden, sequence)] * (norm_elements(arch) // arch.hidden)
    rows = Parameter(padded_vocab(job) // n * arch.hidden, False)
    yield rows
    if arch.position_rows:
        yield Parameter(arch.position_rows * arch.hidden, False)
    yield from norm
    if not arch.tied:
        yield rows
    for kind in arch.layers:
        for rule in kind.tensors:
            (dimension,) = rule.shape
            cut, of_heads = arch.is_cut(rule, n), dimension in ("head_dim", "queries", "keys")
            yield Parameter(arch.size(dimension) // (n if cut else 1), not cut and (n > 1 if of_heads else sequence))
        for linear in kind.linears.values():
            column = linear.kind == "column"
            yield Parameter(linear.weights // n, False)
            if linear.bias:
                yield Parameter(linear.out_features // (n if column else 1), sequence and not column)
