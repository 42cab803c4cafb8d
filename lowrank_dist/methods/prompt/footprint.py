"""What a prompt trains and stores: an embedding of each virtual position. No torch."""

from __future__ import annotations

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.methods.prompt.config import PromptConfig
from lowrank_dist.methods.registry import Parameters
from lowrank_dist.sections.section import MethodName


def parameters(method: MethodName, section: PromptConfig, architecture: Architecture) -> Parameters:
    """length × hidden."""
    count = section.length * architecture.hidden
    return Parameters(count, count)
