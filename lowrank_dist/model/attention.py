"""Core attention of the frozen base: rotary positions and scaled-dot-product attention, on CPU and CUDA alike.

Legend: s positions, b rows of the microbatch, h query heads and g key/value heads of this rank, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class SequencePlan(PackedSeqParams):
    """What attention must know of a microbatch; travels through Megatron's layers as their `packed_seq_params`.

    cos, sin: [s, b or 1, 1, d/2], or None for learned positions. segments: (row, start, end) of every packed sample,
    or None where each row is one sample and causality alone keeps right padding out.
    """

    qkv_format: str = "sbhd"
    cos: Tensor | None = None
    sin: Tensor | None = None
    segments: tuple[tuple[int, int, int], ...] | None = None


class _Rotate(torch.autograd.Function):
    """RoPE in Hugging Face's half-split layout (rotate_half); backward rotates by −θ. Saves no activation."""

    @staticmethod
    def forward(ctx: Any, x_sbhd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_sbhd, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_low, out_high = out.chunk(2, dim=-1)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin)
    return out


class CoreAttention(nn.Module):
    """Megatron's core-attention interface: q [s, b, h, d], k and v [s, b, g, d] → [s, b, h·d]. Causal, no T×T mask."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: SequencePlan,
        **_: Any,
    ) -> Tensor:
        plan = packed_seq_params
        if plan.cos is not None:
            query, key = _Rotate.apply(query, plan.cos, plan.sin), _Rotate.apply(key, plan.cos, plan.sin)
        heads = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        out_bhsd = self._attend(*heads) if plan.segments is None else self._attend_packed(*heads, plan.segments)
        return out_bhsd.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor) -> Tensor:
        grouped = q_bhsd.size(1) != k_bgsd.size(1)
        return F.scaled_dot_product_attention(
            q_bhsd, k_bgsd, v_bgsd, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )

    def _attend_packed(
        self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, segments: tuple[tuple[int, int, int], ...]
    ) -> Tensor:
        """Each sample attends within itself: the cost is Σ length², and no mask exists."""
        rows: list[list[Tensor]] = [[] for _ in range(q_bhsd.size(0))]
        for row, start, end in segments:
            part = (slice(row, row + 1), slice(None), slice(start, end))
            rows[row].append(self._attend(q_bhsd[part], k_bgsd[part], v_bgsd[part]))
        return torch.cat([torch.cat(parts, dim=2) for parts in rows], dim=0)
