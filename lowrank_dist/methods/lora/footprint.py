"""What low-rank updates train and store: A [r, in] and B [out, r] of every target. No torch."""

from __future__ import annotations

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.placement import LoraRules, place
from lowrank_dist.methods.lora.config import LoraConfig
from lowrank_dist.methods.registry import Parameters
from lowrank_dist.sections.section import MethodName


def placement_rules(section: LoraConfig) -> LoraRules:
    """The part of the section by which `place` puts factors on linears."""
    return LoraRules(
        section.rank, section.alpha, section.targets, section.rslora, section.rank_pattern, section.alpha_pattern
    )


def parameters(method: MethodName, section: LoraConfig, architecture: Architecture) -> Parameters:
    """Σ r·(in + out) over all factors."""
    placements = place(architecture, placement_rules(section))
    specs = [spec for placement in placements for spec in placement.factors]
    count = sum(spec.rank * (spec.rows + spec.in_features) for spec in specs)
    return Parameters(count, count)
