"""How many parameters there are: of Φ and of Θ, whole and on one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.rows import LinearLayout
from lowrank_dist.plan.factors import Factor, Layer, total_rank
from lowrank_dist.plan.job import Job, padded_vocab
from lowrank_dist.plan.tuned import norm_elements, parameters


def frozen_parameters(arch: Architecture) -> dict[str, int]:
    """|Φ| by part, unsharded and without padding of the vocabulary."""
    found = {
        "embeddings": arch.vocab * arch.hidden + arch.position_rows * arch.hidden,
        "attention": 0,
        "MLP": 0,
        "biases and norms": 0,
        "output layer": 0 if arch.tied else arch.vocab * arch.hidden,
    }
    for name, linear in arch.linears.items():
        part = "attention" if name in ("linear_qkv", "linear_proj") else "MLP"
        found[part] += arch.layers * linear.weights
        found["biases and norms"] += arch.layers * linear.bias * linear.out_features
    found["biases and norms"] += (2 * arch.layers + 1) * norm_elements(arch)
    found["biases and norms"] += 2 * arch.layers * arch.head_dim * arch.qk_norm
    return found


def frozen_size(arch: Architecture) -> int:
    """|Φ|."""
    return sum(frozen_parameters(arch).values())


def frozen_on_rank(job: Job) -> int:
    """Elements of Φ on a rank, padded vocabulary rows included; the same on every rank."""
    arch, n = job.architecture, job.layout.tensor
    layer = 2 * norm_elements(arch) + 2 * arch.head_dim * arch.qk_norm
    for linear in arch.linears.values():
        sharded_bias = linear.out_features // (n if linear.kind == "column" else 1)
        layer += linear.weights // n + linear.bias * sharded_bias
    vocabulary = padded_vocab(job) // n * arch.hidden * (1 if arch.tied else 2)
    return arch.layers * layer + norm_elements(arch) + vocabulary + arch.position_rows * arch.hidden


@dataclass(frozen=True)
class ThetaOnRank:
    """Elements of Θ on one rank, in the optimiser's two groups.

    replicated: with partial gradients, as A of column- and B of row-parallel linears have; sharded: the others. b,
    total_ranks: elements of B and ranks of all factors, of low-rank updates alone.
    """

    replicated: int
    sharded: int
    b: int
    total_ranks: int

    @property
    def elements(self) -> int:
        return self.replicated + self.sharded


def theta_on_rank(job: Job, tp_rank: int) -> ThetaOnRank:
    """Θ on tensor-parallel rank `tp_rank`: with fewer key/value heads than ranks the shares of B are uneven."""
    replicated = sharded = b = ranks = 0
    if job.tuning.method != "lora":
        groups = parameter_sizes(job, tp_rank)
        return ThetaOnRank(*map(sum, groups), 0, 0)
    for layer, _, count in job.placement.kinds:
        for column, a_elements, b_elements, rank in _linears(job, layer, tp_rank):
            replicated += count * (a_elements if column else b_elements)
            sharded += count * (b_elements if column else a_elements)
            b, ranks = b + count * b_elements, ranks + count * rank
    return ThetaOnRank(replicated, sharded, b, ranks)


def parameter_sizes(job: Job, tp_rank: int) -> tuple[list[int], list[int]]:
    """Elements of every parameter of Θ on a rank with a partial gradient, and of every other, in order."""
    if job.tuning.method != "lora":
        held = parameters(job)
        return [p.elements for p in held if p.partial], [p.elements for p in held if not p.partial]
    replicated, sharded = [], []
    for layer in job.placement.layers:
        for column, a_elements, b_elements, _ in _linears(job, layer, tp_rank):
            replicated.append(a_elements if column else b_elements)
            sharded.append(b_elements if column else a_elements)
    return replicated, sharded


def _linears(job: Job, layer: Layer, tp_rank: int) -> Iterator[tuple[bool, int, int, int]]:
    """(column-parallel, elements of A, elements of B, R) of every adapted linear of a layer on a rank."""
    for layout, factors in zip(job.architecture.linears.values(), layer, strict=True):
        if factors:
            column = layout.kind == "column"
            rank = total_rank(factors)
            a_elements = rank * (factors[0].in_features // (1 if column else job.layout.tensor))
            # A rank without a row of B keeps one element, since DeepSpeed cannot flatten an empty parameter.
            b_elements = max(1, sum(f.rank * _rows_on_rank(layout, f, tp_rank, job.layout.tensor) for f in factors))
            yield column, a_elements, b_elements, rank


def heaviest_rank(job: Job) -> int:
    """The tensor-parallel rank with the most of Θ: the one that a plan speaks of."""
    if job.tuning.method != "lora":
        return 0
    distinct = range(job.layout.tensor if job.layout.tensor > job.architecture.kv_heads else 1)
    return max(distinct, key=lambda rank: (theta_on_rank(job, rank).elements, -rank))


# A plan asks for the same few over and over, for every layout that it tries.
@lru_cache(maxsize=4096)
def _rows_on_rank(layout: LinearLayout, factor: Factor, tp_rank: int, tp_size: int) -> int:
    """Rows of a factor's B on a rank."""
    return sum(segment.length for segment in layout.segments(tp_rank, tp_size) if segment.part in factor.parts)
