"""The section `adapter` of a run."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from lowrank_dist.sections.section import MethodSection

Placement: TypeAlias = Literal["sharded", "replicated"]


class AdapterConfig(MethodSection):
    """Adapter layers, of Houlsby's and of Lin's placement alike."""

    shaping = frozenset({"bottleneck"})

    bottleneck: int = Field(64, ge=1, le=65536, description="width m of a bottleneck, an integer of at least 1")
    placement: Placement = Field(
        "sharded",
        description="sharded (column then row over parallel.tensor, with collectives of its own) or replicated (every "
        "rank stores and computes all of it)",
    )

    def reason_not_shardable(self, tp_size: int) -> str | None:
        return reason_not_shardable(self.bottleneck, self.placement, tp_size)


def reason_not_shardable(bottleneck: int, placement: Placement, tp_size: int) -> str | None:
    """Return why bottlenecks of this width cannot lie on `tp_size` tensor-parallel ranks, with the remedy, or None."""
    if placement == "replicated" or bottleneck % tp_size == 0:
        return None
    return (
        f"adapter.bottleneck={bottleneck} cannot be cut over parallel.tensor={tp_size}: give a multiple of it, "
        "or adapter.placement=replicated"
    )


def places(method: str) -> tuple[str, ...]:
    """Return where a layer has bottlenecks: after attention's projection and the MLP, or after the MLP alone."""
    return ("attention", "mlp") if method == "adapter_h" else ("mlp",)


def has_norm(method: str) -> bool:
    """Return whether a bottleneck has a LayerNorm of its own, as Lin's adapters do."""
    return method == "adapter_l"
