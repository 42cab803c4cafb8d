"""Frequencies and angles of rotary positions, operation by operation as transformers computes them.

Source: transformers `modeling_rope_utils.py`; "llama3" is `apply_scaling` of Meta's llama-models.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_dist.arch.rope import RopeParameters


class Rotation(NamedTuple):
    """cos and sin of every position, [s, b or 1, 1, d/2], and the factor of its queries, [s, b or 1, 1, 1] or None."""

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None


class Frequencies:
    """The inverse frequencies of one kind of rotary positions, float32 [d/2], where d columns of a head are rotated."""

    def __init__(self, rope: RopeParameters, head_dim: int, device: torch.device) -> None:
        self.rope = rope
        columns = rope.rotated(head_dim)
        self.short = inv_freq(rope, columns).to(device)
        self.long = inv_freq(rope, columns, long=True).to(device) if rope.type == "longrope" else None

    def rotation(self, positions_sb: Tensor, lengths_sb: Tensor, dtype: torch.dtype) -> Rotation:
        """Return the rotation of positions [s, b or 1] in `dtype`.

        lengths_sb: tokens of the sample that a position belongs to. The sample alone decides whether longrope takes the
        factors of long samples; transformers takes them for the whole batch where one sample is long.
        """
        rope, positions = self.rope, positions_sb[..., None].float()
        frequencies = self.short
        if self.long is not None:
            is_long = lengths_sb[..., None] > rope.original_max_positions
            frequencies = torch.where(is_long, self.long, self.short)
        angles = (positions * frequencies)[:, :, None, :]
        scale = None
        if rope.query_beta:
            grown = 1 + rope.query_beta * torch.log(1 + torch.floor(positions / rope.original_max_positions))
            scale = grown[:, :, None, :].to(dtype)
        cos, sin = angles.cos(), angles.sin()
        if rope.scaling != 1:
            cos, sin = cos * rope.scaling, sin * rope.scaling
        return Rotation(cos.to(dtype), sin.to(dtype), scale)


def inv_freq(rope: RopeParameters, columns: int, *, long: bool = False) -> Tensor:
    """Return inverse RoPE frequencies [columns / 2] in float32. long: those of samples that longrope calls long."""
    exponents = torch.arange(0, columns, 2, dtype=torch.float32, device="cpu") / columns
    if rope.type == "longrope":
        factors = torch.tensor(rope.long_factors if long else rope.short_factors, dtype=torch.float32, device="cpu")
        return 1.0 / (factors * rope.theta**exponents)
    if rope.type == "yarn":
        return _yarn(rope, rope.theta**exponents, columns)
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        return frequencies / rope.factor
    return _llama3(rope, frequencies) if rope.type == "llama3" else frequencies


def _llama3(rope: RopeParameters, frequencies: Tensor) -> Tensor:
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


def _yarn(rope: RopeParameters, powers: Tensor, columns: int) -> Tensor:
    def column_of(rotations: float) -> float:
        """Return the column whose wave turns `rotations` times over the original positions."""
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return (columns * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = column_of(rope.beta_fast), column_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, columns - 1)
    if low == high:
        high += 0.001  # as transformers does, against a division by zero
    ramp = torch.clamp((torch.arange(columns // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept
