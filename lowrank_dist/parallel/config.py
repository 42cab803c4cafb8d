"""The section `parallel` of a run: how ranks share the model and the data."""

from __future__ import annotations

from pydantic import Field

from lowrank_dist.sections.section import Section


class ParallelConfig(Section):
    """The layout of ranks."""

    tensor: int = Field(1, ge=1, description="tensor-parallel size, an integer of at least 1")
    data: int | None = Field(
        None, ge=1, description="data-parallel size of at least 1, or null for all remaining ranks"
    )
    sequence: bool | None = Field(
        None, description="sequence parallelism: true, false, or null for on when parallel.tensor is above 1"
    )
    across_nodes: bool = Field(
        False,
        description="true (a tensor-parallel group may lie on several nodes, where every layer waits for the network) "
        "or false",
    )
