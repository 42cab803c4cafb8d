"""The footprint of low-rank updates: factors A [r, in] and B [out, r] of every target. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.placement import LoraRules
from lowrank_dist.methods.lora.config import LoraConfig
from lowrank_dist.methods.registry import Sizes
from lowrank_dist.plan.factors import low_rank, on_every_linear
from lowrank_dist.plan.job import Footprint
from lowrank_dist.sections.section import MethodName


@dataclass(frozen=True)
class LowRank(Footprint):
    """Factors alone, which any plan counts."""

    def parts(self, architecture: Architecture) -> dict[str, int]:
        """Return trained elements by the name of the module that has the factors."""
        return self.placement.by_module()


def placement_rules(section: LoraConfig) -> LoraRules:
    """The part of the section by which `place` puts factors on linears."""
    return LoraRules(
        section.rank, section.alpha, section.targets, section.rslora, section.rank_pattern, section.alpha_pattern
    )


def footprint_of(method: MethodName, section: LoraConfig, architecture: Architecture) -> LowRank:
    """Return the footprint. UserError where targets or patterns do not fit the model."""
    return LowRank(method, low_rank(architecture, placement_rules(section)))


def footprints_of_size(method: MethodName, sizes: Sizes, architecture: Architecture, tensor: int) -> list[LowRank]:
    """Return factors of one rank on every linear."""
    return [LowRank(method, on_every_linear(architecture, sizes.rank))]
