"""What full fine-tuning trains and stores: Φ. No torch."""

from __future__ import annotations

import math

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.methods.registry import Parameters
from lowrank_dist.sections.section import MethodName, MethodSection


def parameters(method: MethodName, section: MethodSection, architecture: Architecture) -> Parameters:
    """|Φ|, tied weights once."""
    count = sum(math.prod(shape) for shape in hf_shapes(architecture).values())
    return Parameters(count, count)
