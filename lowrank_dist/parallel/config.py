"""The section `parallel` of a run: how ranks share the model and the data."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from lowrank_dist.sections.section import Section

TensorSize: TypeAlias = Annotated[
    Annotated[Literal["auto"], Tag("word")] | Annotated[Annotated[int, Field(ge=1)], Tag("number")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "number"),
]


class ParallelConfig(Section):
    """The layout of ranks."""

    tensor: TensorSize = Field(
        1,
        description="tensor-parallel size, an integer of at least 1, or auto (at every start, the size of the fastest "
        "layout that fits into the ranks' memory, as `lowrank-dist plan` finds it)",
    )
    data: int | None = Field(
        None, ge=1, description="data-parallel size of at least 1. null: number of ranks / parallel.tensor"
    )
    sequence: bool | None = Field(
        None, description="sequence parallelism: true, false, or null for true where parallel.tensor is above 1"
    )
    across_nodes: bool = Field(
        False,
        description="true (a tensor-parallel group may span nodes, so every layer waits for the network) or false",
    )

    @property
    def tensor_size(self) -> int:
        """The tensor-parallel size of a run that has begun, where `auto` has been replaced."""
        assert isinstance(self.tensor, int), "engine/forecast.py replaces auto before anything is built"
        return self.tensor
