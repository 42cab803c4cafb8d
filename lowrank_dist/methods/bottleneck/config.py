"""The section `adapter` of a run."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from lowrank_dist.sections.section import MethodSection

Placement: TypeAlias = Literal["sharded", "replicated"]


class AdapterConfig(MethodSection):
    """Adapter layers as placed by Houlsby et al. (adapter_h) or by Lin et al. (adapter_l)."""

    shaping = frozenset({"bottleneck"})

    bottleneck: int = Field(64, ge=1, le=65536, description="width m of a bottleneck, an integer of at least 1")
    placement: Placement = Field(
        "sharded",
        description="sharded (column-parallel then row-parallel, with additional collectives) or replicated (on every "
        "rank)",
    )

    def reason_not_shardable(self, tp_size: int) -> str | None:
        return reason_not_shardable(self.bottleneck, self.placement, tp_size)


def reason_not_shardable(bottleneck: int, placement: Placement, tp_size: int) -> str | None:
    """Return why `tp_size` tensor-parallel ranks cannot shard this width, with the remedy; None where they can."""
    if placement == "replicated" or bottleneck % tp_size == 0:
        return None
    return (
        f"adapter.bottleneck={bottleneck} is not a multiple of parallel.tensor={tp_size}; give a multiple, or "
        "adapter.placement=replicated"
    )


def places(method: str) -> tuple[str, ...]:
    """Return the places of a layer's bottlenecks: after the attention projection and the MLP, or only after the MLP."""
    return ("attention", "mlp") if method == "adapter_h" else ("mlp",)


def has_norm(method: str) -> bool:
    """Return whether each bottleneck has its own LayerNorm, as in Lin et al. (adapter_l)."""
    return method == "adapter_l"
