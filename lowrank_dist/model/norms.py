"""Norms that PyTorch has no module for: RMSNorm times 1 + weight, and RMSNorm over the heads of all ranks.

Legend: s positions, b rows of the microbatch, h query heads and g key/value heads of this rank, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lowrank_dist.parallel.collectives import all_reduce


class _ZeroCentered(torch.autograd.Function):
    """RMSNorm times 1 + weight, computed in fp32. It saves its input as it is, and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x.float() * inverse * (1.0 + weight.float())).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed, dx, d_weight = x.float() * inverse, None, None
        if ctx.needs_input_grad[1]:
            d_weight = (dy.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scaled = dy.float() * (1.0 + weight.float())
            mean = (scaled * normed).mean(-1, keepdim=True)
            dx = normed.mul_(-mean).add_(scaled).mul_(inverse).to(x.dtype)
        return dx, d_weight, None


class ZeroCenteredNorm(nn.Module):
    """RMSNorm whose weight is stored less 1 (Gemma): x / √(mean x² + eps) · (1 + weight)."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _ZeroCentered.apply(x, self.weight, self.eps)


class _OverHeads(torch.autograd.Function):
    """RMSNorm of q [s, b, h, d] and of k [s, b, g, d], each over its heads on all ranks.

    widths: features of all query heads, and of all key heads. The sums of squares of both, [s, b, 2], are all-reduced
    together; so are the sums of their backward. shared: number of ranks with the same key head. Each of them has a part
    of that head's gradient, and Megatron adds the parts up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        widths: tuple[int, int],
        shared: int,
        eps: float,
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        own = zip((q, k), (widths[0], widths[1] * shared), strict=True)
        mean_sb2 = torch.stack([x.float().square().sum((-2, -1)) / width for x, width in own], dim=-1)
        inverse_sb2 = torch.rsqrt(_summed(mean_sb2, group) + eps)
        ctx.save_for_backward(q, k, q_weight, k_weight, inverse_sb2)
        ctx.widths, ctx.shared, ctx.group = widths, shared, group
        parts = zip((q, k), (q_weight, k_weight), inverse_sb2.unbind(-1), strict=True)
        out_q, out_k = ((x.float() * r[..., None, None] * _by_head(w, x)).to(x.dtype) for x, w, r in parts)
        return out_q, out_k

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, inverse_sb2 = ctx.saved_tensors
        normed = [x.float() * r[..., None, None] for x, r in zip((q, k), inverse_sb2.unbind(-1), strict=True)]
        d_weights = [
            (d.float() * n).sum((0, 1)).flatten().to(w.dtype) if needed else None
            for d, n, w, needed in zip(dy, normed, (q_weight, k_weight), ctx.needs_input_grad[2:4], strict=True)
        ]
        scaled = [d.float() * _by_head(w, d) for d, w in zip(dy, (q_weight, k_weight), strict=True)]
        own = zip(scaled, normed, ctx.widths, strict=True)
        mean_sb2 = torch.stack([(d * n).sum((-2, -1)) / width for d, n, width in own], dim=-1)
        mean_q, mean_k = _summed(mean_sb2, ctx.group)[..., None, None].unbind(2)
        inverse_q, inverse_k = inverse_sb2[..., None, None].unbind(2)
        dq = normed[0].mul_(-mean_q).add_(scaled[0]).mul_(inverse_q).to(q.dtype)
        dk = normed[1].mul_(-mean_k / ctx.shared).add_(scaled[1]).mul_(inverse_k).to(k.dtype)
        return dq, dk, *d_weights, None, None, None, None


def _summed(values: Tensor, group: ProcessGroup) -> Tensor:
    """Return the values summed over the group, in place."""
    if group.size() > 1:
        all_reduce(values, group).wait()
    return values


def _by_head(weight: Tensor, x: Tensor) -> Tensor:
    """Return the weight in fp32, in the shape of the last two dimensions of x: [heads, d]."""
    return weight.float().view(x.shape[-2:])


class _Weight(nn.Module):
    def __init__(self, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, dtype=dtype))


class HeadsNorm(nn.Module):
    """RMSNorm of queries and keys over all heads (OLMo 2).

    A rank holds the weights of its heads. Where ranks share key heads, each holds the weights of all keys.
    """

    def __init__(self, config: TransformerConfig, group: ProcessGroup) -> None:
        super().__init__()
        assert config.kv_channels is not None and config.num_query_groups is not None
        n, width, key_heads = group.size(), config.kv_channels, config.num_query_groups
        self._widths = config.num_attention_heads * width, key_heads * width
        self._shared = max(1, n // key_heads)
        self._first_key = group.rank() // self._shared * width if self._shared > 1 else 0
        self._keys = max(1, key_heads // n) * width
        self.query = _Weight(self._widths[0] // n, config.params_dtype)
        self.key = _Weight(self._widths[1] if self._shared > 1 else self._keys, config.params_dtype)
        self._eps, self._group = config.layernorm_epsilon, group

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        key_weight = self.key.weight[self._first_key : self._first_key + self._keys]
        return _OverHeads.apply(
            query, key, self.query.weight, key_weight, self._widths, self._shared, self._eps, self._group
        )


class HeadsNormAttention(SelfAttention):
    """Megatron's attention with norms of queries and keys over the heads of all ranks.

    Megatron's own norms of queries and keys see one head at a time, and core attention comes too late: with fewer
    key/value heads than ranks, a rank's heads are known only where q, k and v are cut.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.heads_norm = HeadsNorm(config, self.pg_collection.tp)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        query, key = self.heads_norm(query, key)
        return query, key, value
