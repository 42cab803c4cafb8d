"""What the other methods than low-rank updates train on one tensor-parallel rank, parameter by parameter.

    full       Φ itself (equation 1 of Hu et al., "LoRA", 2021)
    adapter_h  two bottlenecks a layer, after attention and MLP (Houlsby et al. 2019)
    adapter_l  one bottleneck a layer after the MLP, with a LayerNorm of its own (Lin et al. 2020)
    prefix     trained keys and values at l positions of every layer (Li & Liang 2021)
    prompt     trained embeddings at l positions of the input (Lester et al. 2021)

Legend: H hidden, m bottleneck, l virtual positions, w width of the prefix' MLP, N ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.plan.job import Job, padded_vocab


@dataclass(frozen=True)
class Parameter:
    """Elements on the rank; partial: the gradient is summed over tensor parallelism at the end of the step."""

    elements: int
    partial: bool


def parameters(job: Job) -> list[Parameter]:
    """Of any rank, which are alike, in the order that the optimiser goes by."""
    method = job.tuning.method
    assert method != "lora", "low-rank factors are a Placement's"
    if method == "full":
        return list(_full(job))
    if method == "prefix":
        return list(_prefix(job))
    if method == "prompt":
        # Learned positions are added before the tokens are cut over the ranks.
        partial = _sequence(job) and not job.architecture.position_rows
        return [Parameter(job.tuning.virtual * job.architecture.hidden, partial)]
    layer = [parameter for _ in range(job.tuning.bottlenecks) for parameter in _bottleneck(job)]
    return layer * job.architecture.layers


def norm_elements(arch: Architecture) -> int:
    return arch.hidden * (2 if arch.norm == "LayerNorm" else 1)


def _sequence(job: Job) -> bool:
    return job.layout.sequence and job.layout.tensor > 1


def _full(job: Job) -> Iterator[Parameter]:
    """Every weight and bias. A copy sees a rank's tokens alone under sequence parallelism, q's and k's norms its heads
    at any time.
    """
    arch, n, sequence = job.architecture, job.layout.tensor, _sequence(job)
    norm = [Parameter(arch.hidden, sequence)] * (norm_elements(arch) // arch.hidden)
    rows = Parameter(padded_vocab(job) // n * arch.hidden, False)
    yield rows
    if arch.position_rows:
        yield Parameter(arch.position_rows * arch.hidden, False)
    yield from norm
    if not arch.tied:
        yield rows
    for _ in range(arch.layers):
        yield from norm * 2
        yield from [Parameter(arch.head_dim, n > 1)] * (2 * arch.qk_norm)
        for linear in arch.linears.values():
            column = linear.kind == "column"
            yield Parameter(linear.weights // n, False)
            if linear.bias:
                yield Parameter(linear.out_features // (n if column else 1), sequence and not column)


def _bottleneck(job: Job) -> Iterator[Parameter]:
    """Norm, down [m, H] with its bias, up [H, m] with its bias."""
    tuning, hidden, partial = job.tuning, job.architecture.hidden, _sequence(job)
    sharded = tuning.sharded and job.layout.tensor > 1
    rows = tuning.bottleneck // (job.layout.tensor if sharded else 1)
    if tuning.method == "adapter_l":
        yield from [Parameter(hidden, partial)] * 2
    for elements in (rows * hidden, rows, hidden * rows):
        yield Parameter(elements, partial and not sharded)
    yield Parameter(hidden, partial)


def _prefix(job: Job) -> Iterator[Parameter]:
    """Keys and values, or the MLP that makes them. Where ranks share a head, they are whole on every rank."""
    arch, n, tuning = job.architecture, job.layout.tensor, job.tuning
    cut = arch.kv_heads % n == 0
    keys = 2 * arch.layers * (arch.kv_heads // n if cut else arch.kv_heads) * arch.head_dim
    if tuning.width is None:
        yield Parameter(tuning.virtual * keys, not cut)
        return
    for elements in (tuning.virtual * arch.hidden, tuning.width * arch.hidden, tuning.width):
        yield Parameter(elements, True)
    for elements in (keys * tuning.width, keys):
        yield Parameter(elements, not cut)


def virtual_positions(job: Job, tp_rank: int) -> int:
    """Positions of a prompt among a microbatch's tokens on a rank, which under sequence parallelism has a part of a row
    (without learned positions, which are added to all of it). A packed row holds two samples.
    """
    tuning, sequence = job.tuning, _sequence(job) and not job.architecture.position_rows
    if tuning.method != "prompt":
        return 0
    length = job.sequence_length
    samples = (0, length // 2) if job.packing else (0,)
    chunk = length // job.layout.tensor if sequence else length
    first = tp_rank * chunk if sequence else 0
    inside = (min(first + chunk, start + tuning.virtual) - max(first, start) for start in samples)
    return job.layout.micro_batch * sum(max(0, count) for count in inside)
