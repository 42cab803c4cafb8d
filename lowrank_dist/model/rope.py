"""Frequencies of rotary positions."""

import math

import torch

from lowrank_dist.arch.rope import RopeParameters


def inv_freq(rope: RopeParameters, head_dim: int) -> torch.Tensor:
    """Return inverse RoPE frequencies [head_dim / 2] in float32, operation by operation as transformers computes them.

    Source: transformers `modeling_rope_utils.py`; "llama3" is `apply_scaling` of Meta's llama-models.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "default":
        return frequencies
    if rope.type == "linear":
        return frequencies / rope.factor
    low_wavelength = rope.original_max_positions / rope.low_freq_factor
    high_wavelength = rope.original_max_positions / rope.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > low_wavelength, frequencies / rope.factor, frequencies)
    smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_between = ~(wavelength < high_wavelength) & ~(wavelength > low_wavelength)
    return torch.where(is_between, between, scaled)
