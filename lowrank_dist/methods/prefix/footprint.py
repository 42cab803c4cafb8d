"""The footprint of a prefix: keys and values at l virtual positions of every layer. No torch.

Legend: H hidden, L layers, l virtual positions, w width of the MLP that makes keys and values in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_dist.arch.architecture import Architecture, LayerKind
from lowrank_dist.methods.prefix.config import PrefixConfig
from lowrank_dist.methods.registry import Sizes
from lowrank_dist.planner.activations import head_norms, written_out
from lowrank_dist.planner.factors import placement_without_factors
from lowrank_dist.planner.job import Footprint, Job, Parameter, Parameters
from lowrank_dist.sections.section import MethodName

# The linear after which a prefix enters the layer: attention gets keys and values from qkv.
_QKV = "linear_qkv"


@dataclass(frozen=True, kw_only=True)
class PrefixFootprint(Footprint):
    """The footprint of the keys and values of a rank's heads. width: w, or None where they are trained directly."""

    width: int | None

    @property
    def outside_row(self) -> int:
        return self.virtual_positions

    def label(self, job: Job) -> str:
        return "heads"

    def parameters(self, architecture: Architecture) -> Parameters:
        """Return the stored size, 2·L·l·(key/value heads × head width), and the trained size.

        With an MLP these are trained: an embedding [l, H], and H → w → 2·L·(key/value width) with biases.
        """
        keys = 2 * len(architecture.layers) * architecture.kv_heads * architecture.head_dim
        stored = trained = self.virtual_positions * keys
        if self.width is not None:
            embedding = self.virtual_positions * architecture.hidden
            trained = embedding + (architecture.hidden + 1) * self.width + (self.width + 1) * keys
        return Parameters(trained, stored)

    def on_rank(self, job: Job) -> Sequence[Parameter]:
        """Return keys and values, or the MLP that computes them. Where ranks share a head, each rank has all of it."""
        arch, n = job.architecture, job.layout.tensor
        cut = arch.kv_heads % n == 0
        keys = 2 * len(arch.layers) * (arch.kv_heads // n if cut else arch.kv_heads) * arch.head_dim
        if self.width is None:
            return [Parameter(self.virtual_positions * keys, not cut)]
        copies = (self.virtual_positions * arch.hidden, self.width * arch.hidden, self.width)
        return [
            *(Parameter(elements, True) for elements in copies),
            *(Parameter(elements, not cut) for elements in (keys * self.width, keys)),
        ]

    def saved_by_attention(self, job: Job, kind: LayerKind, input_requires_grad: bool, without_method: int) -> int:
        """Return the bytes of keys and values with the prefix, and of queries of the same number of positions.

        These are copies, so the fused q, k, v are not saved for attention. If the layer's input requires no gradient,
        as in the first layer, q, k and v require none either, but the prefix does.
        """
        arch, n, e = job.architecture, job.layout.tensor, job.itemsize
        whole_heads = arch.kv_heads >= n
        # Every sample has its own copy of the prefix. A packed row is assumed to hold two samples.
        positions = job.tokens + job.layout.micro_batch * (2 if job.packing else 1) * self.virtual_positions
        heads = kind.linears["linear_proj"].in_features // n + max(1, arch.kv_heads // n) * arch.head_dim
        found = positions * (2 * heads * e + 4 * arch.heads // n)
        if (arch.qk_norm or kind.norms_all_heads) and input_requires_grad:
            copied = whole_heads and arch.kv_heads // n > 1 and arch.heads > arch.kv_heads
            if kind.norms_all_heads or not written_out(job):
                found += job.tokens * kind.linears["linear_qkv"].out_features // (n if whole_heads else 1) * e
            found += head_norms(job, kind, copied)
        return found

    def saved_by_model(self, job: Job, recompute: bool) -> int:
        """Return the bytes of the MLP's inner activation and, with recomputation, of its output in the base's dtype."""
        arch = job.architecture
        made = (
            self.virtual_positions * 2 * len(arch.layers) * max(1, arch.kv_heads // job.layout.tensor) * arch.head_dim
        )
        inner = 0 if self.width is None else 4 * self.virtual_positions * self.width
        return inner + (made * job.itemsize if recompute and (self.width is not None or job.itemsize < 4) else 0)

    def microbatch_flops(self, architecture: Architecture) -> tuple[int, int]:
        """Return the FLOPs of the MLP: the inner product, which every rank repeats, and the outer, which is sharded."""
        if self.width is None:
            return 0, 0
        once = 3 * 2 * self.virtual_positions * self.width
        keys = 2 * len(architecture.layers) * architecture.kv_heads * architecture.head_dim
        return once * architecture.hidden, once * keys


def footprint_of(method: MethodName, section: PrefixConfig, architecture: Architecture) -> PrefixFootprint:
    return PrefixFootprint(method, placement_without_factors(architecture, _QKV), section.length, width=section.width)


def footprints_of_size(
    method: MethodName, sizes: Sizes, architecture: Architecture, tensor: int
) -> list[PrefixFootprint]:
    """Return the footprint of a prefix with `sizes.virtual_positions` positions."""
    return [
        PrefixFootprint(
            method, placement_without_factors(architecture, _QKV), sizes.virtual_positions, width=sizes.reparametrised
        )
    ]
