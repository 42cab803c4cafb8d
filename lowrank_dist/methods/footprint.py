"""How much a method trains and stores, in closed formulas. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.methods import MethodName
from lowrank_dist.sections.section import MethodSection


@dataclass(frozen=True)
class Parameters:
    """|Θ|, unsharded: while it is trained, and as others load it."""

    trained: int
    stored: int


class Footprint(Protocol):
    """What the module `footprint` of every home has."""

    def parameters(self, method: MethodName, section: MethodSection, architecture: Architecture) -> Parameters:
        """Return |Θ|. Raises UserError where the section does not fit the model."""
        ...
