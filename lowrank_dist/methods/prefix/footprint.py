"""What a prefix trains and stores. No torch. Legend: H hidden, L layers, l positions, w width of the MLP."""

from __future__ import annotations

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.methods.prefix.config import PrefixConfig
from lowrank_dist.methods.registry import Parameters
from lowrank_dist.sections.section import MethodName


def parameters(method: MethodName, section: PrefixConfig, architecture: Architecture) -> Parameters:
    """Keys and values, 2·L·l·(key/value heads × head width), which alone are stored.

    While training with the MLP: an embedding [l, H], and H → w → 2·L·(key/value width) with biases.
    """
    keys = 2 * architecture.layers * architecture.kv_heads * architecture.head_dim
    stored = trained = section.length * keys
    if section.width is not None:
        embedding = section.length * architecture.hidden
        trained = embedding + (architecture.hidden + 1) * section.width + (section.width + 1) * keys
    return Parameters(trained, stored)
