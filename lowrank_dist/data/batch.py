"""From sample numbers to tensors: the order of samples, rows of a batch, and one microbatch.

Legend: b rows of a microbatch, s padded length, n target tokens. Megatron's activations are sequence-major, so
position q of row r is flat index q * b + r.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from lowrank_dist.data.sample import Sample


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Tensors of one forward and backward.

    input_ids [b, s] int64, right-padded with 0; position_ids [b, s] int64, from 0 in every sample, 0 on padding;
    target_index [n] int64, ascending: flat index (sequence-major, [s, b]) of the positions whose next token is a
    target; target_ids [n] int64: those next tokens; dropout_rows [s, b] int64: sample's number in the global batch *
    max_length + position in the sample, 0 on padding; segments: None for one sample a row (plain causal attention is
    right, since padding comes last), else (row, start, end) of every sample and of every row's padding tail, tiling
    each row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    target_index: torch.Tensor
    target_ids: torch.Tensor
    dropout_rows: torch.Tensor
    segments: tuple[tuple[int, int, int], ...] | None


@lru_cache(maxsize=4)
def _permutation(seed: int, n: int, epoch: int) -> np.ndarray:
    # A hash and not seed + epoch: otherwise seed 1's second epoch is seed 2's first.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    permutation = torch.randperm(n, generator=generator).numpy()
    permutation.flags.writeable = False
    return permutation


def order(seed: int, n: int, start: int, count: int) -> np.ndarray:
    """Sample numbers [count] int64 at positions start..start+count of the endless stream of permutations of n.

    A pure function of its arguments, so that any step can be had without the ones before it.
    """
    assert n > 0 and start >= 0 and count >= 0
    pieces, position = [np.empty(0, np.int64)], start
    while position < start + count:
        epoch, offset = divmod(position, n)
        piece = _permutation(seed, n, epoch)[offset : offset + start + count - position]
        pieces.append(piece)
        position += len(piece)
    return np.concatenate(pieces)


def make_rows(lengths: Sequence[int], max_length: int, packing: bool) -> list[list[int]]:
    """Which samples (by place in `lengths`) share a row. One a row without packing, else first-fit in order.

    No row exceeds max_length tokens; every sample is in exactly one row.
    """
    if not packing:
        return [[i] for i in range(len(lengths))]
    rows: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        assert length <= max_length, "longer samples are dropped by load_dataset"
        row = next((r for r, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_length)
        rows[row].append(i)
        room[row] -= length
    return rows


def build_microbatch(
    rows: Sequence[Sequence[tuple[int, Sample]]], *, max_length: int, packing: bool, pad_multiple: int
) -> Microbatch:
    """Lay rows of (number in the global batch, sample) out as tensors; a row may be empty (padding only).

    s is the longest row rounded up to pad_multiple, at least one multiple.
    """
    b = len(rows)
    longest = max((sum(len(sample.tokens) for _, sample in row) for row in rows), default=0)
    s = -(-max(longest, 1) // pad_multiple) * pad_multiple
    input_ids = np.zeros((b, s), np.int64)
    position_ids = np.zeros((b, s), np.int64)
    dropout_rows = np.zeros((s, b), np.int64)
    index = [np.empty(0, np.int64)]
    target_ids = [np.empty(0, np.int64)]
    segments: list[tuple[int, int, int]] = []
    for r, row in enumerate(rows):
        start = 0
        for number, sample in row:
            end = start + len(sample.tokens)
            positions = np.arange(end - start)
            input_ids[r, start:end] = sample.tokens
            position_ids[r, start:end] = positions
            dropout_rows[start:end, r] = number * max_length + positions
            # Position 0 has no predecessor in its sample; the one before it in the row is another sample's.
            (predicted,) = np.nonzero(sample.target[1:])
            index.append((start + predicted) * b + r)
            target_ids.append(sample.tokens[1:][predicted].astype(np.int64))
            segments.append((r, start, end))
            start = end
        if start < s:
            segments.append((r, start, s))
    flat = np.concatenate(index)
    ascending = np.argsort(flat)
    return Microbatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        target_index=torch.from_numpy(flat[ascending]),
        target_ids=torch.from_numpy(np.concatenate(target_ids)[ascending]),
        dropout_rows=torch.from_numpy(dropout_rows),
        segments=tuple(segments) if packing else None,
    )
