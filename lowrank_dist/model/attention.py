"""Core attention of the frozen base: rotary positions and scaled-dot-product attention, on CPU and CUDA alike.

Legend: s positions, b rows of the microbatch, h query heads and g key/value heads of this rank, d head width, l
positions of a trained prefix, L layers, t all columns of keys: the s new ones and those before them (cache or prefix),
e head width with the columns of a sink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_dist.arch.architecture import WINDOW_BLOCK, LayerKind
from lowrank_dist.arch.rope import RopeParameters
from lowrank_dist.model.rope import Rotation

# Columns that a sink adds to a head: one, and zeros up to the 8 that GPU kernels ask of a head's width.
_SINK_COLUMNS = 8


class KVCache:
    """The rotated keys and the values of every layer on this rank, for left-padded rows.

    All rows fill a column at the same time. A trained prefix takes the first l columns, before the padding. Megatron's
    inference context is not used because it stores keys before core attention, where ours are not rotated yet.
    """

    def __init__(
        self,
        padding: Tensor,
        *,
        layers: int,
        kv_heads: int,
        columns: int,
        head_dim: int,
        dtype: torch.dtype,
        prefix: Tensor | None = None,
    ) -> None:
        """Allocate the cache. padding: int64 [b], empty columns at the left of each row. columns: the capacity.

        prefix: [L, 2, g, l, d], the same for all rows.
        """
        self.padding = padding
        self._padded = bool(padding.any())
        self._prefix = self.filled = 0 if prefix is None else prefix.size(3)
        shape = (layers, padding.size(0), kv_heads, self.filled + columns, head_dim)
        self._tokens = padding.new_empty(padding.size(0), 0)
        self._keys = torch.empty(shape, dtype=dtype, device=padding.device)
        self._values = torch.empty_like(self._keys)
        if prefix is not None:
            for stored, part in ((self._keys, prefix[:, 0]), (self._values, prefix[:, 1])):
                stored[..., : self.filled, :] = part[:, None]

    def append(self, input_ids: Tensor, boundary: int | None) -> Tensor:
        """Record the tokens [b, s] of the next columns and return those to compute: these, or all from the first.

        boundary: the sample length, in tokens, above which longrope has other frequencies; None = no such length. A
        row that grows past it needs all its columns again.
        """
        lengths = self.filled - self.padding
        self._tokens = torch.cat((self._tokens, input_ids), dim=1)
        if boundary is None or self._tokens.size(1) == input_ids.size(1):
            return input_ids
        if not bool(((lengths <= boundary) & (lengths + input_ids.size(1) > boundary)).any()):
            return input_ids
        self.filled = self._prefix
        return self._tokens

    def extend(self, layer: int, k_bgsd: Tensor, v_bgsd: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next s columns of one layer and return all its keys and values so far, [b, g, t, d]."""
        end = self.filled + k_bgsd.size(2)
        held = []
        for stored, new in ((self._keys[layer], k_bgsd), (self._values[layer], v_bgsd)):
            stored[:, :, self.filled : end] = new
            held.append(stored[:, :, :end])
        return held[0], held[1]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these of the present rows, given in ascending order. Works in place."""
        for place, row in enumerate(rows):
            if place != row:
                for stored in (self._keys, self._values):
                    stored[:, place, :, : self.filled] = stored[:, row, :, : self.filled]
        self._keys, self._values = self._keys[:, : len(rows)], self._values[:, : len(rows)]
        self.padding, self._tokens = self.padding[list(rows)], self._tokens[list(rows)]
        self._padded = bool(self.padding.any())

    def visible(self, new: int, window: int | None) -> Tensor | None:
        """Return the attention mask of the next `new` columns: bool [b, 1, s, t], or None where causality suffices.

        window: position i sees j with i − window < j ≤ i. Padding sees itself, so that no softmax has an empty row. All
        rows see the prefix, which precedes their first tokens.
        """
        total = self.filled + new
        causal = new == 1 or self.filled == 0
        if causal and not self._padded and (window is None or total <= window):
            return None
        columns = torch.arange(total, device=self.padding.device)
        queries = columns[self.filled :, None]
        kept = (columns < self._prefix) | (columns >= self._prefix + self.padding[:, None, None])
        seen = (columns <= queries) & kept
        if window is not None:
            # The padding between a prefix and its row takes no positions.
            positions = columns - self.padding[:, None].where(columns >= self._prefix, 0)
            seen &= positions[:, None] > positions[:, self.filled :, None] - window
        return (seen | (columns == queries))[:, None]


@dataclass
class SequencePlan(PackedSeqParams):
    """The layout of a microbatch for attention, passed through Megatron's layers as their `packed_seq_params`.

    rotations: rotary positions of a layer → the rotation of each position. segments: (row, start, end) of every packed
    sample, or None where each row is one sample and causality alone keeps right padding out. cache: the earlier columns
    when decoding. visible: sliding window of a layer → `KVCache.visible` of the new columns. prefix: [L, 2, g, l, d],
    trained keys and values that every position sees; a cache holds its own prefix. masks: sliding window → its
    `window_mask`, which all layers share.
    """

    qkv_format: str = "sbhd"
    rotations: Mapping[RopeParameters, Rotation] = field(default_factory=dict)
    segments: Sequence[tuple[int, int, int]] | None = None
    cache: KVCache | None = None
    visible: Mapping[int | None, Tensor | None] = field(default_factory=dict)
    prefix: Tensor | None = None
    masks: dict[int, Tensor] = field(default_factory=dict)

    def window_mask(self, window: int, like: Tensor) -> Tensor:
        """Return the additive mask [c, c + window − 1] of c queries: query a sees keys a to a + window − 1."""
        if window not in self.masks:
            block = min(WINDOW_BLOCK, window)
            keys, queries = (torch.arange(size, device=like.device) for size in (block + window - 1, block))
            ahead = keys - queries[:, None]
            hidden = (ahead < 0) | (ahead >= window)
            self.masks[window] = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
                hidden, -torch.inf
            )
        return self.masks[window]


class _Rotate(torch.autograd.Function):
    """RoPE of the first columns of a head; backward rotates by −θ. Saves no activation.

    n columns are rotated in pairs: column i with i + n/2 (Hugging Face's rotate_half), or interleaved, column 2i with
    2i + 1.
    """

    @staticmethod
    def forward(ctx: Any, x_sbhd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x_sbhd, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin, ctx.interleaved), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = 2 * cos.size(-1)
    if columns < x.size(-1):
        out[..., columns:] = x[..., columns:]
    low, high = _pairs(x[..., :columns], interleaved)
    out_low, out_high = _pairs(out[..., :columns], interleaved)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of the first and of the second column of every rotated pair."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    low, high = x.chunk(2, dim=-1)
    return low, high


class CoreAttention(nn.Module):
    """Megatron's core-attention interface: q [s, b, h, d], k and v [s, b, g, d] → [s, b, h·d]. Causal, no s×s mask.

    sinks: [h], a score of each query head that joins the softmax of all its queries and adds no value: out ·
    sigmoid(lse − sink). None without sinks. They are an additional key, so that every kernel computes them and their
    gradient: queries get a column with sink / scale, the key has 1 there and 0 elsewhere, and its value is 0.
    """

    def __init__(
        self, config: Any, layer_number: int, kind: LayerKind, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.layer = layer_number - 1  # Megatron counts from 1
        self.kind = kind
        self.softmax_scale = softmax_scale
        self.sinks: nn.Parameter | None = None
        if kind.has_sinks:
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.sinks = nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            # Not left to the kernel, which would take it from the wider heads.
            self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

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
        rope = self.kind.rope
        if rope is not None:
            cos, sin, query_scale = plan.rotations[rope]
            query = _Rotate.apply(query, cos, sin, rope.interleaved)
            if query_scale is not None:
                query = query * query_scale
            key = _Rotate.apply(key, cos, sin, rope.interleaved)
        q_bhsd, k_bgsd, v_bgsd = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if plan.cache is not None:
            visible = plan.visible[self.kind.sliding_window]
            out_bhsd = self._attend_cached(q_bhsd, *plan.cache.extend(self.layer, k_bgsd, v_bgsd), visible)
        else:
            out_bhsd = (self._attend if plan.segments is None else self._attend_packed)(q_bhsd, k_bgsd, v_bgsd, plan)
        return out_bhsd[..., : query.size(-1)].permute(2, 0, 1, 3).flatten(2)

    def _with_sinks(self, q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [b, h, s, e], and k and v [b, g, 1 + t, e] whose first key is the sink."""
        assert self.sinks is not None and self.softmax_scale is not None
        columns = q_bhsd.new_zeros(_SINK_COLUMNS)
        columns[0] = 1 / self.softmax_scale
        of_heads = (self.sinks[:, None, None] * columns).expand(*q_bhsd.shape[:3], _SINK_COLUMNS)
        key = k_bgtd.new_zeros(k_bgtd.size(-1) + _SINK_COLUMNS)
        key[k_bgtd.size(-1)] = 1
        before = key.expand(*k_bgtd.shape[:2], 1, -1)
        keys = torch.cat((before, F.pad(k_bgtd, (0, _SINK_COLUMNS))), dim=2)
        return torch.cat((q_bhsd, of_heads), dim=-1), keys, F.pad(v_bgtd, (0, _SINK_COLUMNS, 1, 0))

    def _attend(self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, plan: SequencePlan) -> Tensor:
        """Return causal attention [b, h, s, d] of samples that begin with the first position."""
        before = 0
        if plan.prefix is not None:
            prefix = plan.prefix[self.layer]  # [2, g, l, d], before all positions
            before = prefix.size(2)
            k_bgsd, v_bgsd = (
                torch.cat((part.expand(len(own), *part.shape), own), dim=2)
                for part, own in zip(prefix, (k_bgsd, v_bgsd), strict=True)
            )
        window = self.kind.sliding_window
        windowed = window is not None and k_bgsd.size(2) > window
        if self.sinks is not None:
            q_bhsd, k_bgsd, v_bgsd = self._with_sinks(q_bhsd, k_bgsd, v_bgsd)
        if windowed:
            assert window is not None
            return self._attend_window(q_bhsd, k_bgsd, v_bgsd, before, window, plan.window_mask(window, q_bhsd))
        return self._attend_causal(q_bhsd, k_bgsd, v_bgsd)

    def _attend_causal(self, q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor) -> Tensor:
        """Return attention of the last positions, each to the keys up to its own."""
        before = k_bgtd.size(2) - q_bhsd.size(2)
        if before:
            # Zero queries for the keys before make as many queries as keys. Every kernel's built-in causal mask is then
            # right, and no mask tensor exists.
            q_bhsd = F.pad(q_bhsd, (0, 0, before, 0))
        return F.scaled_dot_product_attention(
            q_bhsd,
            k_bgtd,
            v_bgtd,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=q_bhsd.size(1) != k_bgtd.size(1),
        )[:, :, before:]

    def _attend_window(
        self, q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, before: int, window: int, mask: Tensor
    ) -> Tensor:
        """Return attention where a query sees itself and the window − 1 keys before it, in blocks of queries.

        before: keys before the first query, a sink not counted. mask: `SequencePlan.window_mask`. A block of c queries
        meets at most c + window − 1 keys, so the cost is s · (c + window) and no mask is larger than a block's. Every
        query sees the sink, which is the first key.
        """
        blocks = []
        sinks = int(self.sinks is not None)
        (sink_keys, k_bgtd), (sink_values, v_bgtd) = ((x[:, :, :sinks], x[:, :, sinks:]) for x in (k_bgtd, v_bgtd))
        for start in range(0, q_bhsd.size(2), mask.size(0)):
            q_bhcd = q_bhsd[:, :, start : start + mask.size(0)]
            first = start + before - window + 1  # the first key that the block's first query sees
            keys = slice(max(0, first), start + before + q_bhcd.size(2))
            seen = mask[: q_bhcd.size(2), keys.start - first : keys.stop - first]
            block_keys, block_values = k_bgtd[:, :, keys], v_bgtd[:, :, keys]
            if sinks:
                block_keys = torch.cat((sink_keys, block_keys), dim=2)
                block_values, seen = torch.cat((sink_values, block_values), dim=2), F.pad(seen, (1, 0))
            blocks.append(
                F.scaled_dot_product_attention(
                    q_bhcd,
                    block_keys,
                    block_values,
                    attn_mask=seen,
                    scale=self.softmax_scale,
                    enable_gqa=q_bhsd.size(1) != k_bgtd.size(1),
                )
            )
        return torch.cat(blocks, dim=2)

    def _attend_packed(self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, plan: SequencePlan) -> Tensor:
        """Return attention within each sample. The cost is Σ length², and no mask tensor of a row exists."""
        rows: list[list[Tensor]] = [[] for _ in range(q_bhsd.size(0))]
        assert plan.segments is not None
        for row, start, end in plan.segments:
            part = (slice(row, row + 1), slice(None), slice(start, end))
            rows[row].append(self._attend(q_bhsd[part], k_bgsd[part], v_bgsd[part], plan))
        return torch.cat([torch.cat(parts, dim=2) for parts in rows], dim=0)

    def _attend_cached(self, q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, visible: Tensor | None) -> Tensor:
        """Return attention of the new columns to the earlier ones and to themselves."""
        group = q_bhsd.size(1) // k_bgtd.size(1)
        if self.sinks is not None:
            q_bhsd, k_bgtd, v_bgtd = self._with_sinks(q_bhsd, k_bgtd, v_bgtd)
            visible = None if visible is None else F.pad(visible, (1, 0), value=True)
        if q_bhsd.size(2) == 1:
            # With one position the query heads of a group can stand for positions of one head, so that keys and values
            # need not be repeated.
            q_bhsd = q_bhsd.reshape(q_bhsd.size(0), k_bgtd.size(1), group, -1)
            out = F.scaled_dot_product_attention(q_bhsd, k_bgtd, v_bgtd, attn_mask=visible, scale=self.softmax_scale)
            return out.flatten(1, 2)[:, :, None]
        if visible is None:
            return self._attend_causal(q_bhsd, k_bgtd, v_bgtd)
        # Repeated here, since on CUDA no fused kernel takes both a mask and grouped heads.
        k_bhtd, v_bhtd = (tensor.repeat_interleave(group, dim=1) for tensor in (k_bgtd, v_bgtd))
        return F.scaled_dot_product_attention(q_bhsd, k_bhtd, v_bhtd, attn_mask=visible, scale=self.softmax_scale)
