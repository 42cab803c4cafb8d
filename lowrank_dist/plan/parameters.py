"""How many parameters there are: of Φ and of Θ, whole and on one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowrank_dist.plan.job import Job, padded_vocab
from lowrank_dist.plan.placement import Factor, Layer, total_rank
from lowrank_dist.plan.shapes import LINEARS, Shape
from lowrank_dist.plan.tuned import norm_elements, parameters


def frozen_parameters(shape: Shape) -> dict[str, int]:
    """|Φ| by part, unsharded and without padding of the vocabulary."""
    found = {
        "embeddings": shape.vocab * shape.hidden + shape.position_rows * shape.hidden,
        "attention": 0,
        "MLP": 0,
        "biases and norms": 0,
        "output layer": 0 if shape.tied else shape.vocab * shape.hidden,
    }
    for name, linear in shape.linears.items():
        part = "attention" if name in ("linear_qkv", "linear_proj") else "MLP"
        found[part] += shape.layers * linear.weights
        found["biases and norms"] += shape.layers * linear.bias * linear.out_features
    found["biases and norms"] += (2 * shape.layers + 1) * norm_elements(shape)
    found["biases and norms"] += 2 * shape.layers * shape.head_dim * shape.qk_norm
    return found


def frozen_size(shape: Shape) -> int:
    """|Φ|."""
    return sum(frozen_parameters(shape).values())


def frozen_on_rank(job: Job) -> int:
    """Elements of Φ on a rank, padded vocabulary rows included; the same on every rank."""
    shape, n = job.shape, job.layout.tensor
    layer = 2 * norm_elements(shape) + 2 * shape.head_dim * shape.qk_norm
    for linear in shape.linears.values():
        sharded_bias = linear.out_features // (n if linear.kind == "column" else 1)
        layer += linear.weights // n + linear.bias * sharded_bias
    vocabulary = padded_vocab(job) // n * shape.hidden * (1 if shape.tied else 2)
    return shape.layers * layer + norm_elements(shape) + vocabulary + shape.position_rows * shape.hidden


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
    for name, factors in zip(LINEARS, layer, strict=True):
        if factors:
            column = job.shape.linears[name].kind == "column"
            rank = total_rank(factors)
            a_elements = rank * (factors[0].in_features // (1 if column else job.layout.tensor))
            # A rank without a row of B keeps one element, since DeepSpeed cannot flatten an empty parameter.
            b_elements = max(1, sum(f.rank * _rows_on_rank(job, name, f, tp_rank) for f in factors))
            yield column, a_elements, b_elements, rank


def heaviest_rank(job: Job) -> int:
    """The tensor-parallel rank with the most of Θ: the one that a plan speaks of."""
    if job.tuning.method != "lora":
        return 0
    distinct = range(job.layout.tensor if job.layout.tensor > job.shape.kv_heads else 1)
    return max(distinct, key=lambda rank: (theta_on_rank(job, rank).elements, -rank))


def _rows_on_rank(job: Job, name: str, factor: Factor, tp_rank: int) -> int:
    """Rows of a factor's B on a rank."""
    n = job.layout.tensor
    linear = job.shape.linears[name]
    if linear.kind == "row":
        return factor.rows
    if name != "linear_qkv":
        return factor.rows // n
    block = linear.out_features // n
    first, last = tp_rank * block, (tp_rank + 1) * block
    return sum(
        max(0, min(last, start + length) - max(first, start))
        for part, start, length in _qkv_runs(job.shape)
        if part in factor.parts
    )


def _qkv_runs(shape: Shape) -> Iterator[tuple[int, int, int]]:
    """(part, first row, rows) of the fused q, k, v matrix: by key/value group its q heads, its k head, its v head."""
    start = 0
    for _ in range(shape.kv_heads):
        for part, heads in ((0, shape.heads // shape.kv_heads), (1, 1), (2, 1)):
            yield part, start, heads * shape.head_dim
            start += heads * shape.head_dim
