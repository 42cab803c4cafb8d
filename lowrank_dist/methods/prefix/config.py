"""The section `prefix` of a run."""

from __future__ import annotations

from pydantic import Field

from lowrank_dist.sections.section import MethodSection


class PrefixConfig(MethodSection):
    """A prefix: trained keys and values at virtual positions of every layer."""

    shaping = frozenset({"length", "width"})

    length: int = Field(16, ge=1, le=65536, description="number of virtual positions, an integer of at least 1")
    width: int | None = Field(
        512,
        ge=1,
        le=65536,
        description="width of the MLP that computes keys and values during training, or null for no MLP",
    )

    @property
    def virtual_positions(self) -> int:
        return self.length
