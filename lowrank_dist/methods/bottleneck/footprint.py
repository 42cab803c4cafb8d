"""The footprint of adapter layers: bottlenecks [H, m], [m, H] behind a layer's sublayers. No torch.

    adapter_h  two a layer, behind attention and MLP, with GELU (Houlsby et al. 2019)
    adapter_l  one a layer, behind the MLP, with ReLU and a LayerNorm of its own (Lin et al. 2020)

Under tensor parallelism a bottleneck is sharded (column then row: messages of its own, which nothing hides) or
replicated (no message; every rank stores and computes all of it).

Legend: T tokens of a microbatch, T_j on a rank outside attention and MLP, H hidden, m bottleneck, N ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.methods.bottleneck.config import AdapterConfig, has_norm, places, reason_not_shardable
from lowrank_dist.methods.registry import Sizes
from lowrank_dist.plan.factors import Layer, Placement, joined
from lowrank_dist.plan.job import Call, Footprint, Job, LayerCalls, LayerFlops, Moment, Parameter, Parameters
from lowrank_dist.plan.traffic import GATHER, REDUCE, SCATTER
from lowrank_dist.sections.section import MethodName

# The linear behind which the lowest bottleneck of a layer joins, by where that is.
_LINEAR = {"attention": "linear_proj", "mlp": "linear_fc2"}


@dataclass(frozen=True, kw_only=True)
class Bottlenecks(Footprint):
    """bottleneck: m. sharded: cut over tensor parallelism, where there is any; else a copy on every rank."""

    bottleneck: int
    sharded: bool

    @property
    def residual_passes(self) -> int:
        """A bottleneck is read, added to its input and written, a bias in between."""
        return 6 * self._count

    def label(self, job: Job) -> str:
        return "sharded" if self._cut(job) else "replicated"

    def reason_not_shardable(self, tensor: int) -> str | None:
        return reason_not_shardable(self.bottleneck, "sharded" if self.sharded else "replicated", tensor)

    def placed_otherwise(self, tensor: int) -> tuple[Footprint, ...]:
        other = replace(self, sharded=not self.sharded)
        return () if tensor == 1 or other.reason_not_shardable(tensor) is not None else (other,)

    def parameters(self, architecture: Architecture) -> Parameters:
        """Return (2·H·m + m + H) a bottleneck, and 2·H for its LayerNorm (Hu et al. 2021, section 5.1)."""
        hidden, m = architecture.hidden, self.bottleneck
        one = 2 * hidden * m + m + hidden + (2 * hidden if self._norm else 0)
        count = len(architecture.layers) * self._count * one
        return Parameters(count, count)

    def on_rank(self, job: Job) -> Sequence[Parameter]:
        return [*self._parameters(job)] * (self._count * len(job.architecture.layers))

    def saved_by_layer(self, job: Job, stream: bool) -> int:
        found = self._count * self._saved(job)
        if self._lowest_sends_nothing(stream) and job.itemsize < 4:
            found -= job.itemsize * job.architecture.hidden * self._rows(job)  # kept only to form that gradient
        return found

    def saved_behind_mlp(self, job: Job) -> int:
        return self._saved(job)

    def backward_moments(self, job: Job, top: Layer, kept: int) -> Sequence[Moment]:
        """The topmost bottleneck: its output's gradient and its input's; where it is cut, one of them of all tokens."""
        e, hidden = job.itemsize, job.architecture.hidden
        whole = job.tokens * hidden * e if self.sharded and job.sequence_parallel else 0
        working = (2 if whole == 0 else 1) * job.shard_tokens * hidden * e
        parts = {"activations": kept, "communication buffers": whole, "working memory": working}
        return [Moment("backward of the top bottleneck", parts)]

    def evaluation_working(self, job: Job, residual: int) -> int:
        """A sublayer's output on its way through the bottleneck, with and without its bias."""
        return (8 + job.architecture.linear_bias) * residual

    def layer_flops(self, architecture: Architecture, tokens: int, stream: bool) -> LayerFlops:
        """Two products forward; dX and dW of both backward, but the lowest dX where nothing needs it."""
        product = 2 * tokens * architecture.hidden * self.bottleneck
        forward = 2 * self._count * product
        backward = 2 * forward - self._lowest_sends_nothing(stream) * product
        # Non-reentrant checkpoint stops at the last tensor that was saved: before the last product.
        return LayerFlops(forward, backward, forward - product, not self.sharded)

    def layer_calls(self, job: Job, stream: bool) -> LayerCalls:
        """As many calls backward as forward, but the lowest dX where nothing needs it."""
        own = self._forward_calls(job)
        backward = list(own * self._count)
        if backward and self._lowest_sends_nothing(stream):
            backward.remove((SCATTER, own[-1][1]) if job.layout.sequence else own[-1])
        behind_attention = own if self._count == 2 else ()
        # A copy has saved its input behind the MLP's reduction.
        return LayerCalls(behind_attention, own, tuple(backward), last_again=not self.sharded)

    @property
    def _count(self) -> int:
        return len(places(self.name))

    @property
    def _norm(self) -> bool:
        return has_norm(self.name)

    def _cut(self, job: Job) -> bool:
        return self.sharded and job.layout.tensor > 1

    def _rows(self, job: Job) -> int:
        """Rows of m on a rank."""
        return self.bottleneck // (job.layout.tensor if self._cut(job) else 1)

    def _lowest_sends_nothing(self, stream: bool) -> bool:
        """Return whether the lowest bottleneck forms no gradient of its input: none is asked for below, and no trained
        norm is before it.
        """
        return not stream and not self._norm

    def _parameters(self, job: Job) -> Iterator[Parameter]:
        """Yield those of one bottleneck: norm, down [m, H] with its bias, up [H, m] with its bias."""
        hidden, partial, rows = job.architecture.hidden, job.sequence_parallel, self._rows(job)
        if self._norm:
            yield from [Parameter(hidden, partial)] * 2
        for elements in (rows * hidden, rows, hidden * rows):
            yield Parameter(elements, partial and not self._cut(job))
        yield Parameter(hidden, partial)

    def _saved(self, job: Job) -> int:
        """The inputs of both products, what the activation saves, and weights that are cast where they are used."""
        e, h, cut, rows = job.itemsize, job.architecture.hidden, self._cut(job), self._rows(job)
        found = (job.tokens if cut and job.sequence_parallel else job.shard_tokens) * h * e
        # GELU saves its input; ReLU its output, which the second product saves too.
        found += (job.tokens if cut else job.shard_tokens) * rows * e * (1 if self._norm else 2)
        casts = 2 * rows * h
        if self._norm:
            # The LayerNorm saves its input and two statistics of each row, and its weight.
            found += job.shard_tokens * (h + 2) * e
            casts += h
        return found + (casts * e if e < 4 else 0)

    def _forward_calls(self, job: Job) -> tuple[Call, ...]:
        """Return the calls of one bottleneck that is cut: a column then a row linear."""
        if not self.sharded:
            return ()
        whole = job.tokens * job.architecture.hidden * job.itemsize
        return ((GATHER, whole), (SCATTER, whole)) if job.layout.sequence else ((REDUCE, whole),)


def footprint_of(method: MethodName, section: AdapterConfig, architecture: Architecture) -> Bottlenecks:
    sharded = section.placement == "sharded"
    return Bottlenecks(method, _joined(method, architecture), bottleneck=section.bottleneck, sharded=sharded)


def footprints_of_size(method: MethodName, sizes: Sizes, architecture: Architecture, tensor: int) -> list[Bottlenecks]:
    """Return bottlenecks that are sharded, where they can be, and such that are replicated."""
    placement = _joined(method, architecture)
    kinds = [False] if tensor == 1 or sizes.bottleneck % tensor else [True, False]
    return [Bottlenecks(method, placement, bottleneck=sizes.bottleneck, sharded=sharded) for sharded in kinds]


def _joined(method: MethodName, architecture: Architecture) -> Placement:
    return joined(architecture, _LINEAR[places(method)[0]])
