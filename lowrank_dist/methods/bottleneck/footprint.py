"""The footprint of adapter layers: bottlenecks [H, m], [m, H] after a layer's sublayers. No torch.

    adapter_h  two per layer, after attention and MLP, with GELU (Houlsby et al. 2019)
    adapter_l  one per layer, after the MLP, with ReLU and a LayerNorm of its own (Lin et al. 2020)

Under tensor parallelism a bottleneck is sharded (column then row parallel, with collectives that no computation hides)
or replicated (no collective; every rank stores and computes all of it).

Legend: H hidden, m width of a bottleneck, N ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.methods.bottleneck.config import AdapterConfig, has_norm, places, reason_not_shardable
from lowrank_dist.methods.registry import Sizes
from lowrank_dist.planner.factors import Layer, Placement, placement_without_factors
from lowrank_dist.planner.job import Call, Footprint, Job, LayerCalls, LayerFlops, Moment, Parameter, Parameters
from lowrank_dist.planner.traffic import GATHER, REDUCE, SCATTER
from lowrank_dist.sections.section import MethodName

# Place of the lowest bottleneck of a layer → the linear that it follows.
_LINEAR = {"attention": "linear_proj", "mlp": "linear_fc2"}


@dataclass(frozen=True, kw_only=True)
class Bottlenecks(Footprint):
    """The footprint of a method's bottlenecks. bottleneck: m. sharded: over tensor-parallel ranks, else replicated."""

    bottleneck: int
    sharded: bool

    @property
    def residual_passes(self) -> int:
        """6 per bottleneck: 1 to read its input, 2 to add the bias, 3 to add its output to the input."""
        return 6 * self._count

    def label(self, job: Job) -> str:
        return "sharded" if self._cut(job) else "replicated"

    def reason_not_shardable(self, tensor: int) -> str | None:
        return reason_not_shardable(self.bottleneck, "sharded" if self.sharded else "replicated", tensor)

    def placed_otherwise(self, tensor: int) -> tuple[Footprint, ...]:
        other = replace(self, sharded=not self.sharded)
        return () if tensor == 1 or other.reason_not_shardable(tensor) is not None else (other,)

    def parameters(self, architecture: Architecture) -> Parameters:
        """Return 2·H·m + m + H per bottleneck, plus 2·H for its LayerNorm (Hu et al. 2021, section 5.1)."""
        hidden, m = architecture.hidden, self.bottleneck
        one = 2 * hidden * m + m + hidden + (2 * hidden if self._norm else 0)
        count = len(architecture.layers) * self._count * one
        return Parameters(count, count)

    def on_rank(self, job: Job) -> Sequence[Parameter]:
        return [*self._parameters(job)] * (self._count * len(job.architecture.layers))

    def saved_by_layer(self, job: Job, input_requires_grad: bool) -> int:
        found = self._count * self._saved(job)
        if self._lowest_sends_nothing(input_requires_grad) and job.itemsize < 4:
            found -= job.itemsize * job.architecture.hidden * self._rows(job)  # the cast W_down, saved for dX only
        return found

    def saved_behind_mlp(self, job: Job) -> int:
        return self._saved(job)

    def backward_moments(self, job: Job, top: Layer, kept: int) -> Sequence[Moment]:
        """Return the moment when the topmost bottleneck runs backward: the gradients of its output and its input.

        If the bottleneck is sharded under sequence parallelism, one of the two covers all tokens, the other a shard.
        """
        e, hidden = job.itemsize, job.architecture.hidden
        whole = job.tokens * hidden * e if self.sharded and job.sequence_parallel else 0
        working = (2 if whole == 0 else 1) * job.shard_tokens * hidden * e
        parts = {"activations": kept, "communication buffers": whole, "working memory": working}
        return [Moment("backward of the top bottleneck", parts)]

    def evaluation_working(self, job: Job, residual: int) -> int:
        """Return the bytes of a sublayer's output and its bottleneck: 8 residuals, 9 where that output has a bias."""
        return (8 + (job.architecture.proj_bias or job.architecture.mlp_bias)) * residual

    def layer_flops(self, architecture: Architecture, tokens: int, input_requires_grad: bool) -> LayerFlops:
        """Return the FLOPs of two products forward, and of both dX and dW backward (the lowest dX only if needed)."""
        product = 2 * tokens * architecture.hidden * self.bottleneck
        forward = 2 * self._count * product
        backward = 2 * forward - self._lowest_sends_nothing(input_requires_grad) * product
        # Non-reentrant checkpoint stops at the last saved tensor, so it does not repeat the last product.
        return LayerFlops(forward, backward, forward - product, not self.sharded)

    def layer_calls(self, job: Job, input_requires_grad: bool) -> LayerCalls:
        """Return the calls: as many backward as forward, but that of the lowest dX only if it is needed."""
        own = self._forward_calls(job)
        backward = list(own * self._count)
        if backward and self._lowest_sends_nothing(input_requires_grad):
            backward.remove((SCATTER, own[-1][1]) if job.layout.sequence else own[-1])
        behind_attention = own if self._count == 2 else ()
        # A replicated bottleneck saves its input, which is the output of the MLP's reduction.
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
        """Return the rank's part of m: m / N where it is sharded."""
        return self.bottleneck // (job.layout.tensor if self._cut(job) else 1)

    def _lowest_sends_nothing(self, input_requires_grad: bool) -> bool:
        """Return whether the lowest bottleneck computes no gradient of its input.

        That holds where nothing below it requires a gradient and it has no trained norm.
        """
        return not input_requires_grad and not self._norm

    def _parameters(self, job: Job) -> Iterator[Parameter]:
        """Yield the parameters of one bottleneck: norm, down [m, H] with its bias, up [H, m] with its bias."""
        hidden, partial, rows = job.architecture.hidden, job.sequence_parallel, self._rows(job)
        if self._norm:
            yield from [Parameter(hidden, partial)] * 2
        for elements in (rows * hidden, rows, hidden * rows):
            yield Parameter(elements, partial and not self._cut(job))
        yield Parameter(hidden, partial)

    def _saved(self, job: Job) -> int:
        """Return the bytes saved by one bottleneck: inputs of both products and of the activation, and cast weights."""
        e, h, cut, rows = job.itemsize, job.architecture.hidden, self._cut(job), self._rows(job)
        found = (job.tokens if cut and job.sequence_parallel else job.shard_tokens) * h * e
        # GELU saves its input; ReLU its output, which the second product saves too.
        found += (job.tokens if cut else job.shard_tokens) * rows * e * (1 if self._norm else 2)
        casts = 2 * rows * h
        if self._norm:
            # The LayerNorm saves its input, two statistics per row, and its weight.
            found += job.shard_tokens * (h + 2) * e
            casts += h
        return found + (casts * e if e < 4 else 0)

    def _forward_calls(self, job: Job) -> tuple[Call, ...]:
        """Return the calls of one bottleneck, a column-parallel then a row-parallel linear; none if replicated."""
        if not self.sharded:
            return ()
        whole = job.tokens * job.architecture.hidden * job.itemsize
        return ((GATHER, whole), (SCATTER, whole)) if job.layout.sequence else ((REDUCE, whole),)


def footprint_of(method: MethodName, section: AdapterConfig, architecture: Architecture) -> Bottlenecks:
    sharded = section.placement == "sharded"
    return Bottlenecks(method, _joined(method, architecture), bottleneck=section.bottleneck, sharded=sharded)


def footprints_of_size(method: MethodName, sizes: Sizes, architecture: Architecture, tensor: int) -> list[Bottlenecks]:
    """Return the footprint of replicated bottlenecks, preceded by that of sharded ones if `tensor` > 1 divides m."""
    placement = _joined(method, architecture)
    kinds = [False] if tensor == 1 or sizes.bottleneck % tensor else [True, False]
    return [Bottlenecks(method, placement, bottleneck=sizes.bottleneck, sharded=sharded) for sharded in kinds]


def _joined(method: MethodName, architecture: Architecture) -> Placement:
    return placement_without_factors(architecture, _LINEAR[places(method)[0]])
