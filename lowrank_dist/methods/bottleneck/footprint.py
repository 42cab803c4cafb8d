"""What adapter layers train and store. No torch. Legend: H hidden, m bottleneck."""

from __future__ import annotations

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.methods.bottleneck.config import AdapterConfig, has_norm, places
from lowrank_dist.methods.registry import Parameters
from lowrank_dist.sections.section import MethodName


def parameters(method: MethodName, section: AdapterConfig, architecture: Architecture) -> Parameters:
    """(2·H·m + m + H) a bottleneck, and 2·H for its LayerNorm where it has one (Hu et al. 2021, section 5.1)."""
    hidden, m = architecture.hidden, section.bottleneck
    one = 2 * hidden * m + m + hidden + (2 * hidden if has_norm(method) else 0)
    count = architecture.layers * len(places(method)) * one
    return Parameters(count, count)
