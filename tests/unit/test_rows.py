"""The row map against Megatron's interleave, written independently with torch operations on labelled rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_dist.arch.rows import LinearLayout, Part, Segment


def qkv_layout(kv_heads: int, queries_per_group: int, head_dim: int, fused: bool = False) -> LinearLayout:
    queries, keys = kv_heads * queries_per_group * head_dim, kv_heads * head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    offsets = (0, queries, queries + keys) if fused else (0, 0, 0)
    parts = tuple(
        Part(name, "h.{layer}.attn.c_attn" if fused else f"layers.{{layer}}.{name}", count, offset)
        for (name, count), offset in zip(rows.items(), offsets, strict=True)
    )
    return LinearLayout("column", 8, queries + 2 * keys, parts, "qkv", False, group=(queries_per_group, head_dim))


def megatron_rows(layout: LinearLayout, tp_size: int) -> list[torch.Tensor]:
    """Return the row labels of every rank (part × 10⁶ + row of the part), in the order of Megatron's attention: viewed
    as [groups, (queries_per_group + 2), head_dim], flattened and cut into even blocks.
    """
    queries_per_group, head_dim = layout.group
    q, k, v = (index * 10**6 + torch.arange(part.rows) for index, part in enumerate(layout.parts))
    groups = len(k) // head_dim
    fused = torch.cat(
        [q.view(groups, queries_per_group, head_dim), k.view(groups, 1, head_dim), v.view(groups, 1, head_dim)], dim=1
    )
    return list(fused.flatten().chunk(tp_size))


def labels(segments: tuple[Segment, ...], rows: int) -> torch.Tensor:
    """Return the same labels from segments; -1 where there is no segment. Every row may be written once."""
    found = torch.full((rows,), -1)
    for segment in segments:
        target = found[segment.local_start : segment.local_start + segment.length]
        assert len(target) == segment.length > 0 and (target == -1).all(), "segments overlap or leave the shard"
        target.copy_(segment.part * 10**6 + segment.part_start + torch.arange(segment.length))
    return found


@st.composite
def qkv_cases(draw: st.DrawFn) -> tuple[LinearLayout, int]:
    layout = qkv_layout(draw(st.integers(1, 6)), draw(st.integers(1, 6)), 2 * draw(st.integers(1, 8)))
    sizes = [size for size in range(1, 17) if layout.out_features % size == 0]
    return layout, draw(st.sampled_from(sizes))


@settings(deadline=None)
@given(qkv_cases())
def test_qkv_segments_are_megatrons_interleave(case: tuple[LinearLayout, int]) -> None:
    layout, tp_size = case
    block = layout.out_features // tp_size
    for tp_rank, expected in enumerate(megatron_rows(layout, tp_size)):
        segments = layout.segments(tp_rank, tp_size)
        assert torch.equal(labels(segments, block), expected)
        assert [segment.local_start for segment in segments] == sorted(segment.local_start for segment in segments)


@settings(deadline=None)
@given(qkv_cases())
def test_qkv_segments_partition_every_projection(case: tuple[LinearLayout, int]) -> None:
    layout, tp_size = case
    seen = [torch.zeros(part.rows, dtype=torch.int64) for part in layout.parts]
    for tp_rank in range(tp_size):
        for segment in layout.segments(tp_rank, tp_size):
            seen[segment.part][segment.part_start : segment.part_start + segment.length] += 1
    assert all((count == 1).all() for count in seen)


@pytest.mark.parametrize("defect", ["k and v swapped", "stacked, not interleaved", "off by one group"])
def test_a_wrong_interleave_is_noticed(defect: str) -> None:
    layout, tp_size = qkv_layout(4, 2, 4), 2
    right = torch.cat([labels(layout.segments(rank, tp_size), 32) for rank in range(tp_size)])
    assert torch.equal(right, torch.cat(megatron_rows(layout, tp_size)))
    if defect == "k and v swapped":
        part = right // 10**6
        wrong = right + (part == 1) * 10**6 - (part == 2) * 10**6
    elif defect == "stacked, not interleaved":
        wrong = right.sort().values
    else:
        wrong = right.roll(4 * 4)  # one group: (2 query heads + k + v) × head_dim 4
    assert not torch.equal(wrong, torch.cat(megatron_rows(layout, tp_size)))


def test_fewer_kv_heads_than_ranks_leaves_parts_empty() -> None:
    """One group of 4 query heads on 4 ranks: 6 heads in 4 blocks of 1.5 heads, so k and v lie on ranks 2 and 3."""
    layout = qkv_layout(1, 4, 16)
    assert layout.segments(0, 4) == (Segment(0, 0, 0, 24),)
    assert layout.segments(1, 4) == (Segment(0, 0, 24, 24),)
    assert layout.segments(2, 4) == (Segment(0, 0, 48, 16), Segment(16, 1, 0, 8))
    assert layout.segments(3, 4) == (Segment(0, 1, 8, 8), Segment(8, 2, 0, 16))


@settings(deadline=None)
@given(ffn=st.integers(1, 12), tp_size=st.integers(1, 8))
def test_gate_up_keeps_each_ranks_gate_beside_its_up(ffn: int, tp_size: int) -> None:
    """Each rank has `ffn` rows of both."""
    parts = (Part("gate_proj", "g", ffn * tp_size), Part("up_proj", "u", ffn * tp_size))
    layout = LinearLayout("column", 4, 2 * ffn * tp_size, parts, "gate_up", False)
    gate, up = torch.arange(ffn * tp_size), 10**6 + torch.arange(ffn * tp_size)
    for tp_rank in range(tp_size):
        own = slice(tp_rank * ffn, (tp_rank + 1) * ffn)
        assert torch.equal(labels(layout.segments(tp_rank, tp_size), 2 * ffn), torch.cat([gate[own], up[own]]))
    assert layout.local_shape(tp_size) == (2 * ffn, 4)


def test_row_layout_has_all_rows_on_every_rank() -> None:
    layout = LinearLayout("row", 12, 8, (Part("o_proj", "o", 8),), "none", False)
    assert [layout.segments(rank, 4) for rank in range(4)] == [(Segment(0, 0, 0, 8),)] * 4
    assert layout.local_shape(4) == (8, 3)


def test_parts_of_one_tensor_add_up() -> None:
    layout = qkv_layout(4, 1, 4, fused=True)
    assert layout.tensor_rows("h.{layer}.attn.c_attn") == 48
    assert qkv_layout(2, 2, 4).tensor_rows("layers.{layer}.k_proj") == 8
