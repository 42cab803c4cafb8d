"""How many parameters there are, of Φ and of Θ, whole and on one rank, and what they take on disk and in host memory.

ZeRO 1 and 2 (deepspeed 0.19, runtime/zero/stage_1_and_2.py) hold parameters with partial gradients and the others as
two groups, each flattened and cut evenly over data parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from lowrank_dist.arch.architecture import Architecture, LayerKind
from lowrank_dist.arch.rows import LinearLayout
from lowrank_dist.plan.factors import Factor, Layer, total_rank
from lowrank_dist.plan.job import ITEMSIZE, Job, padded_vocab

# nccl_start_alignment_factor: a flat group is padded to a multiple of this times the data-parallel size.
_ALIGNMENT = 2
# engine/zero.py: the most elements of a bucket that was not asked for.
_LARGEST_BUCKET = 5 * 10**8
# model/load.py converts at most this much at a time; everything else stays in pages of the mapped files.
_CHUNK = 16 * 2**20
# A rank with torch, Megatron, DeepSpeed and transformers loaded: anonymous memory as measured on a CPU. What CUDA's
# driver and NCCL take of the host beside is assumed.
_PROCESS, _CUDA = 330 * 2**20, 1500 * 2**20


def norm_elements(arch: Architecture) -> int:
    return arch.hidden * (2 if arch.norm == "LayerNorm" else 1)


def frozen_parameters(arch: Architecture) -> dict[str, int]:
    """|Φ| by part, unsharded and without padding of the vocabulary."""
    found = {
        "embeddings": arch.vocab * arch.hidden + arch.position_rows * arch.hidden,
        "attention": 0,
        "MLP": 0,
        "biases and norms": 0,
        "output layer": 0 if arch.tied else arch.vocab * arch.hidden,
    }
    found["biases and norms"] += norm_elements(arch)
    for kind, count in arch.kinds.items():
        for linear in kind.linears.values():
            found["attention" if linear.in_attention else "MLP"] += count * linear.weights
            found["biases and norms"] += count * linear.bias * linear.out_features
        found["biases and norms"] += count * _other_elements(arch, kind)
    return found


def _other_elements(arch: Architecture, kind: LayerKind) -> int:
    """Elements of a layer outside its linears: its norms."""
    return sum(math.prod(arch.size(dimension) for dimension in rule.shape) for rule in kind.tensors)


def frozen_size(arch: Architecture) -> int:
    """|Φ|."""
    return sum(frozen_parameters(arch).values())


def frozen_on_rank(job: Job) -> int:
    """Elements of Φ on a rank, padded vocabulary rows included; the same on every rank."""
    arch, n = job.architecture, job.layout.tensor
    layers = 0
    for kind, count in arch.kinds.items():
        layers += count * _other_elements(arch, kind)
        for linear in kind.linears.values():
            sharded_bias = linear.out_features // (n if linear.kind == "column" else 1)
            layers += count * (linear.weights // n + linear.bias * sharded_bias)
    vocabulary = padded_vocab(job) // n * arch.hidden * (1 if arch.tied else 2)
    return layers + norm_elements(arch) + vocabulary + arch.position_rows * arch.hidden


@dataclass(frozen=True)
class ThetaOnRank:
    """Elements of Θ on one rank, in the optimiser's two groups.

    replicated: with partial gradients, as A of column- and B of row-parallel linears have; sharded: the others. b,
    rows, total_ranks: elements of B, rows and ranks of all factors.
    """

    replicated: int
    sharded: int
    b: int
    rows: int
    total_ranks: int

    @property
    def elements(self) -> int:
        return self.replicated + self.sharded


def theta_on_rank(job: Job, tp_rank: int) -> ThetaOnRank:
    """Θ on tensor-parallel rank `tp_rank`: with fewer key/value heads than ranks the shares of B are uneven."""
    own = job.footprint.on_rank(job)
    replicated = sum(p.elements for p in own if p.partial)
    sharded = sum(p.elements for p in own if not p.partial)
    b = rows = ranks = 0
    for layer, _, count in job.placement.kinds:
        for linear in _linears(job, layer, tp_rank):
            replicated += count * sum(linear.partial)
            sharded += count * sum(linear.whole)
            b, rows, ranks = b + count * linear.b, rows + count * linear.rows, ranks + count * linear.rank
    return ThetaOnRank(replicated, sharded, b, rows, ranks)


def parameter_sizes(job: Job, tp_rank: int) -> tuple[list[int], list[int]]:
    """Elements of every parameter of Θ on a rank with a partial gradient, and of every other, in order."""
    own = job.footprint.on_rank(job)
    replicated, sharded = [p.elements for p in own if p.partial], [p.elements for p in own if not p.partial]
    for layer in job.placement.layers:
        for linear in _linears(job, layer, tp_rank):
            replicated += linear.partial
            sharded += linear.whole
    return replicated, sharded


@dataclass(frozen=True)
class _Linear:
    """An adapted linear on a rank. a, b: elements of A and B. scales: of a parameter over B's rows, or empty.

    rank: R.
    """

    column: bool
    a: int
    b: int
    scales: tuple[int, ...]
    rows: int
    rank: int

    @property
    def partial(self) -> tuple[int, ...]:
        """Elements of each parameter with a partial gradient."""
        return (self.a,) if self.column else (self.b, *self.scales)

    @property
    def whole(self) -> tuple[int, ...]:
        """Elements of every other."""
        return (self.b, *self.scales) if self.column else (self.a,)


def _linears(job: Job, layer: Layer, tp_rank: int) -> Iterator[_Linear]:
    """Yield the adapted linears of a layer."""
    for layout, factors in layer.linears:
        rank = total_rank(factors)
        if rank:
            column = layout.kind == "column"
            a_elements = rank * (factors[0].in_features // (1 if column else job.layout.tensor))
            rows = [_rows_on_rank(layout, factor, tp_rank, job.layout.tensor) for factor in factors]
            # A rank without a row of B keeps one element, since DeepSpeed cannot flatten an empty parameter.
            b_elements = max(1, sum(factor.rank * held for factor, held in zip(factors, rows, strict=True)))
            scales = (max(1, sum(rows)),) * job.footprint.trains_row_scales
            yield _Linear(column, a_elements, b_elements, scales, sum(rows), rank)


def heaviest_rank(job: Job) -> int:
    """The tensor-parallel rank with the most of Θ: the one that a plan speaks of."""
    distinct = range(job.layout.tensor if job.layout.tensor > job.architecture.kv_heads else 1)
    return max(distinct, key=lambda rank: (theta_on_rank(job, rank).elements, -rank))


# A plan asks for the same few over and over, for every layout that it tries.
@lru_cache(maxsize=4096)
def _rows_on_rank(layout: LinearLayout, factor: Factor, tp_rank: int, tp_size: int) -> int:
    """Rows of a factor's B on a rank."""
    return sum(segment.length for segment in layout.segments(tp_rank, tp_size) if segment.part in factor.parts)


def partition_elements(group: int, data: int) -> int:
    """Elements of one data-parallel rank's share of a parameter group of `group` elements, padding included."""
    return math.ceil(group / (_ALIGNMENT * data)) * _ALIGNMENT


def bucket_size(job: Job, tp_rank: int) -> int:
    """Elements of the buffer that DeepSpeed allocates in every backward."""
    return job.reduce_bucket or min(_LARGEST_BUCKET, theta_on_rank(job, tp_rank).elements)


def bucket_elements(job: Job, tp_rank: int) -> list[int]:
    """Elements of each reduction over data parallelism: parameters are copied together until the next does not fit."""
    size, buckets = bucket_size(job, tp_rank), [0]
    replicated, sharded = parameter_sizes(job, tp_rank)
    for elements in replicated + sharded:
        if buckets[-1] and buckets[-1] + elements > size:
            buckets.append(0)
        buckets[-1] += elements
    return buckets


def base_bytes(job: Job) -> int:
    """The Hugging Face checkpoint, and a merged model of its dtype."""
    return frozen_size(job.architecture) * ITEMSIZE[job.stored_dtype]


def adapter_bytes(job: Job) -> int:
    """What others load: Θ in fp32 (header and JSON are some tens of kB), or a model where Φ is trained."""
    return base_bytes(job) if job.footprint.trains_base else 4 * job.footprint.parameters(job.architecture).stored


def checkpoint_bytes(job: Job) -> int:
    """A checkpoint is what others load with masters and two moments beside it."""
    return adapter_bytes(job) + 12 * job.footprint.parameters(job.architecture).trained


def disk_bytes(job: Job, keep_last: int | None, keep_best: int) -> int:
    """Base, checkpoints that are kept at a time (one more while it is written), and the adapter at the end.

    Where all checkpoints are kept, one is counted: the rest grows with the run.
    """
    kept = (1 if keep_last is None else keep_last) + keep_best + 1
    return base_bytes(job) + kept * checkpoint_bytes(job) + adapter_bytes(job)


def host_bytes(job: Job, ranks_on_node: int) -> int:
    """Anonymous memory of a node while it loads. Pages of the mapped checkpoint come and go, and are not counted.

    On a CPU a rank's shard lies there too. While it saves, rank 0 receives masters and moments of all of Θ.
    """
    beside = job.itemsize * frozen_on_rank(job) if job.device == "cpu" else _CUDA
    return ranks_on_node * (_PROCESS + _CHUNK + beside)


def saving_bytes(job: Job) -> int:
    """What rank 0 holds more of in host memory while a checkpoint is written: masters and moments of all of Θ, or
    where they are streamed of the largest weight.
    """
    if job.footprint.trains_base:
        arch = job.architecture
        return 12 * max(arch.vocab * arch.hidden, *(x.weights for kind in arch.kinds for x in kind.linears.values()))
    return 12 * job.footprint.parameters(job.architecture).trained
