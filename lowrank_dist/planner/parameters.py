"""Parameter counts of the base (Φ) and of what is trained (Θ), whole and on a rank; sizes on disk and in host memory.

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
from lowrank_dist.planner.factors import Factor, Layer, total_rank
from lowrank_dist.planner.job import ITEMSIZE, Job, padded_vocab

# DeepSpeed's nccl_start_alignment_factor: a flat group is padded to a multiple of this times the data-parallel size.
_ALIGNMENT = 2
# engine/zero.py: the most elements of a bucket whose size is not configured.
_LARGEST_BUCKET = 5 * 10**8
# model/load.py converts at most this many bytes at a time; the rest stays in pages of the mapped files.
_CHUNK = 16 * 2**20
# Anonymous memory of a rank in bytes, with torch, Megatron, DeepSpeed and transformers loaded, as measured on a CPU;
# and host memory that CUDA's driver and NCCL take in addition, an assumption.
_PROCESS, _CUDA = 330 * 2**20, 1500 * 2**20


def norm_elements(arch: Architecture) -> int:
    return arch.hidden * (2 if arch.norm == "LayerNorm" else 1)


def frozen_parameters(arch: Architecture) -> dict[str, int]:
    """Return |Φ| by part, unsharded and without padding of the vocabulary."""
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
        found["biases and norms"] += count * _other_elements(arch, kind, 1)
    return found


def _other_elements(arch: Architecture, kind: LayerKind, tp_size: int) -> int:
    """Return the elements of a layer outside its linears on a rank: its norms."""
    return sum(
        math.prod(arch.size(dimension) for dimension in rule.shape) // (tp_size if arch.is_cut(rule, tp_size) else 1)
        for rule in kind.tensors
    )


def frozen_size(arch: Architecture) -> int:
    """Return |Φ|."""
    return sum(frozen_parameters(arch).values())


def frozen_on_rank(job: Job) -> int:
    """Return the elements of Φ on a rank, padded vocabulary rows included; the same on every rank."""
    arch, n = job.architecture, job.layout.tensor
    layers = 0
    for kind, count in arch.kinds.items():
        layers += count * _other_elements(arch, kind, n)
        for linear in kind.linears.values():
            sharded_bias = linear.out_features // (n if linear.kind == "column" else 1)
            layers += count * (linear.weights // n + linear.bias * sharded_bias)
    vocabulary = padded_vocab(job) // n * arch.hidden * (1 if arch.tied else 2)
    return layers + norm_elements(arch) + vocabulary + arch.position_rows * arch.hidden


@dataclass(frozen=True)
class ThetaOnRank:
    """Elements of Θ on one rank, in the optimizer's two groups.

    replicated: elements with partial gradients, as in A of column- and B of row-parallel linears; sharded: the others.
    b: elements of all B. rows: rows of all B. total_ranks: Σ r over all factors.
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
    """Return Θ on tensor-parallel rank `tp_rank`. With fewer key/value heads than ranks the shares of B are uneven."""
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
    """Return the elements of each parameter of Θ on a rank, in order: those with partial gradients, and the others."""
    own = job.footprint.on_rank(job)
    replicated, sharded = [p.elements for p in own if p.partial], [p.elements for p in own if not p.partial]
    for layer in job.placement.layers:
        for linear in _linears(job, layer, tp_rank):
            replicated += linear.partial
            sharded += linear.whole
    return replicated, sharded


@dataclass(frozen=True)
class _Linear:
    """An adapted linear on a rank. a, b: elements of A and B. scales: elements of its row scales, or empty.

    rows: rows of B. rank: R.
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
        """Elements of each other parameter."""
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
            b_elements = max(1, sum(factor.adapter_rank * held for factor, held in zip(factors, rows, strict=True)))
            scales = (max(1, sum(rows)),) * job.footprint.trains_row_scales
            yield _Linear(column, a_elements, b_elements, scales, sum(rows), rank)


def heaviest_rank(job: Job) -> int:
    """Return the tensor-parallel rank with the most of Θ, which is the one that a plan describes."""
    distinct = range(job.layout.tensor if job.layout.tensor > job.architecture.kv_heads else 1)
    return max(distinct, key=lambda rank: (theta_on_rank(job, rank).elements, -rank))


# Cached, because a plan asks for the same few values for every layout that it tries.
@lru_cache(maxsize=4096)
def _rows_on_rank(layout: LinearLayout, factor: Factor, tp_rank: int, tp_size: int) -> int:
    """Return the rows of a factor's B on a rank."""
    return sum(segment.length for segment in layout.segments(tp_rank, tp_size) if segment.part in factor.parts)


def partition_elements(group: int, data: int) -> int:
    """Return the elements of one data-parallel rank's share of a group of `group` elements, padding included."""
    return math.ceil(group / (_ALIGNMENT * data)) * _ALIGNMENT


def bucket_size(job: Job, tp_rank: int) -> int:
    """Return the elements of the buffer that DeepSpeed allocates in every backward."""
    return job.reduce_bucket or min(_LARGEST_BUCKET, theta_on_rank(job, tp_rank).elements)


def bucket_elements(job: Job, tp_rank: int) -> list[int]:
    """Return the elements of each reduction over data parallelism.

    Parameters are copied into a bucket until the next one does not fit.
    """
    size, buckets = bucket_size(job, tp_rank), [0]
    replicated, sharded = parameter_sizes(job, tp_rank)
    for elements in replicated + sharded:
        if buckets[-1] and buckets[-1] + elements > size:
            buckets.append(0)
        buckets[-1] += elements
    return buckets


def base_bytes(job: Job) -> int:
    """Return the bytes of the Hugging Face checkpoint, which are also those of a merged model of its dtype."""
    return frozen_size(job.architecture) * ITEMSIZE[job.stored_dtype]


def adapter_bytes(job: Job) -> int:
    """Return the bytes of the adapter (Θ in fp32, without tens of kB of header and JSON) or of the trained model."""
    return base_bytes(job) if job.footprint.trains_base else 4 * job.footprint.parameters(job.architecture).stored


def checkpoint_bytes(job: Job) -> int:
    """Return the bytes of a checkpoint: what others load (`adapter_bytes`), masters and two moments."""
    return adapter_bytes(job) + 12 * job.footprint.parameters(job.architecture).trained


def disk_bytes(job: Job, keep_last: int | None, keep_best: int) -> int:
    """Return the bytes of the base, the kept checkpoints, one checkpoint being written, and the adapter.

    If all checkpoints are kept, one is counted, because the rest grows with the run.
    """
    kept = (1 if keep_last is None else keep_last) + keep_best + 1
    return base_bytes(job) + kept * checkpoint_bytes(job) + adapter_bytes(job)


def host_bytes(job: Job, ranks_on_node: int) -> int:
    """Return the anonymous memory of a node while it loads. Droppable pages of the mapped checkpoint do not count.

    On a CPU a rank's shard is included. While it saves, rank 0 takes `saving_bytes` more.
    """
    beside = job.itemsize * frozen_on_rank(job) if job.device == "cpu" else _CUDA
    return ranks_on_node * (_PROCESS + _CHUNK + beside)


def saving_bytes(job: Job) -> int:
    """Return the host memory that rank 0 takes in addition while a checkpoint is written.

    It holds masters and moments of all of Θ or, where Φ is trained and they are streamed, those of the largest weight.
    """
    if job.footprint.trains_base:
        arch = job.architecture
        return 12 * max(arch.vocab * arch.hidden, *(x.weights for kind in arch.kinds for x in kind.linears.values()))
    return 12 * job.footprint.parameters(job.architecture).trained
