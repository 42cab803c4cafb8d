"""Sample order, rows, microbatches, and the share of a global batch of each data-parallel rank.

All of it depends only on the seed and on the number of samples consumed so far. Legend: b rows of a microbatch, s
padded length, n target tokens. Activations are sequence-major, as in Megatron, so position q of row r is flat index
`q * b + r`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from lowrank_dist.data.dataset import Dataset
from lowrank_dist.data.masking import Sample


@dataclass(frozen=True, eq=False)
class Microbatch:
    """The tensors of one forward and backward pass.

    input_ids [b, s] int64, right-padded with 0; position_ids [b, s] int64, from 0 in every sample, 0 on padding;
    target_index [n] int64, ascending: flat index (sequence-major, [s, b]) of the positions whose next token is a
    target; target_ids [n] int64: those next tokens; dropout_rows [s, b] int64: the sample's number in the global batch
    * max_length + position in the sample, 0 on padding; segments: None without packing (plain causal attention is
    correct, since padding comes last), else (row, start, end) of every sample and of the padding at the end of every
    row, which together cover each row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    target_index: torch.Tensor
    target_ids: torch.Tensor
    dropout_rows: torch.Tensor
    segments: tuple[tuple[int, int, int], ...] | None


@lru_cache(maxsize=4)
def _permutation(seed: int, n: int, epoch: int) -> np.ndarray:
    # A hash and not seed + epoch, with which seed 1's second epoch would equal seed 2's first.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    permutation = torch.randperm(n, generator=generator).numpy()
    permutation.flags.writeable = False
    return permutation


def order(seed: int, n: int, start: int, count: int) -> np.ndarray:
    """Return sample indices [count] int64, from position `start` on in an endless stream of permutations of n samples.

    A pure function of its arguments, so that the samples of any step can be computed without the steps before it.
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
    """Return the samples (indices into `lengths`) of each row: one per row without packing, else first-fit in order.

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


def padded_length(longest: int, pad_multiple: int) -> int:
    """Return the longest row's length rounded up to pad_multiple, at least one multiple."""
    return -(-max(longest, 1) // pad_multiple) * pad_multiple


def build_microbatch(
    rows: Sequence[Sequence[tuple[int, Sample]]], *, max_length: int, packing: bool, pad_multiple: int
) -> Microbatch:
    """Return the microbatch of rows of (number in the global batch, sample); an empty row is padding only.

    s is `padded_length` of the longest row.
    """
    b = len(rows)
    longest = max((sum(len(sample.tokens) for _, sample in row) for row in rows), default=0)
    s = padded_length(longest, pad_multiple)
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
            # Position 0 is no target: the token before it in the row, if any, belongs to another sample.
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


@dataclass(frozen=True, eq=False)
class StepBatch:
    """This rank's share of one global batch; every rank has the same number of microbatches.

    samples, global_targets and global_tokens count samples, target and non-padding tokens over all ranks;
    lengths: tokens of each sample, on which the cost of attention depends. epoch: passes over the data set completed
    with this batch.
    """

    microbatches: list[Microbatch]
    samples: int
    global_targets: int
    global_tokens: int
    lengths: np.ndarray
    epoch: float


@dataclass(frozen=True)
class BatchSplit:
    """The split of a global batch into rows and microbatches, and the position of this data-parallel rank.

    micro_batch: rows of a microbatch. max_length: the value that the data set was loaded with (row limit of packing,
    stride of dropout_rows). pad_multiple: rows are padded to a multiple of it.
    """

    micro_batch: int
    max_length: int
    packing: bool
    dp_rank: int
    dp_size: int
    pad_multiple: int

    def __post_init__(self) -> None:
        assert min(self.micro_batch, self.max_length, self.dp_size, self.pad_multiple) >= 1
        assert 0 <= self.dp_rank < self.dp_size

    def batch(self, dataset: Dataset, numbers: np.ndarray, epoch: float) -> StepBatch:
        """Return this rank's share of the global batch of the samples `numbers`."""
        lengths = dataset.lengths[numbers]
        rows, group = self._rows(lengths), self.micro_batch * self.dp_size
        ours = self.dp_rank * self.micro_batch
        microbatches = [
            build_microbatch(
                [[(i, dataset[int(numbers[i])]) for i in row] for row in rows[at : at + self.micro_batch]],
                max_length=self.max_length,
                packing=self.packing,
                pad_multiple=self.pad_multiple,
            )
            for at in range(ours, len(rows), group)
        ]
        targets, tokens = int(dataset.targets[numbers].sum()), int(lengths.sum())
        return StepBatch(microbatches, len(numbers), targets, tokens, lengths, epoch)

    def positions(self, lengths: np.ndarray) -> int:
        """Return the positions of a global batch on all ranks, padding included. lengths [n]: of its samples."""
        rows, b = self._rows(lengths), self.micro_batch
        longest = (max(int(lengths[row].sum()) for row in rows[at : at + b]) for at in range(0, len(rows), b))
        return sum(b * padded_length(length, self.pad_multiple) for length in longest)

    def _rows(self, lengths: np.ndarray) -> list[list[int]]:
        """Return the samples of each row, longest row first, with empty rows up to whole microbatches of all ranks."""
        rows = make_rows(lengths.tolist(), self.max_length, self.packing)
        # Put rows of similar length side by side: it reduces padding and balances the ranks, and does not change the
        # loss. The sort is stable, so the order depends on the batch alone.
        rows.sort(key=lambda row: -int(lengths[row].sum()))
        rows += [[] for _ in range(-len(rows) % (self.micro_batch * self.dp_size))]
        return rows


class Loader:
    """Training batches of `global_batch` samples from the shuffled stream of `dataset`, endless or up to `end`."""

    def __init__(
        self, dataset: Dataset, split: BatchSplit, *, seed: int, global_batch: int, end: int | None = None
    ) -> None:
        """end: number of samples of the stream to train on; the last batch may be smaller. None: no end."""
        assert global_batch >= 1 and len(dataset) > 0 and int(dataset.lengths.max()) <= split.max_length
        self._dataset, self._split, self._seed = dataset, split, seed
        self._global_batch, self._end = global_batch, end

    def batch(self, position: int) -> StepBatch:
        """Return the batch that starts after `position` samples of the stream."""
        numbers = self._numbers(position)
        return self._split.batch(self._dataset, numbers, (position + len(numbers)) / len(self._dataset))

    def samples(self, position: int) -> list[Sample]:
        """Return the samples of the whole global batch that starts there, on all ranks, in the order of their numbers.

        A sample's number is the one in `Microbatch.dropout_rows`.
        """
        return [self._dataset[int(number)] for number in self._numbers(position)]

    def _numbers(self, position: int) -> np.ndarray:
        size = self._global_batch
        if self._end is not None:
            size = min(size, self._end - position)
        assert size > 0, "no sample is left to train on"
        return order(self._seed, len(self._dataset), position, size)


def eval_batches(dataset: Dataset, split: BatchSplit, *, global_batch: int) -> Iterator[StepBatch]:
    """Yield batches of `global_batch` samples in file order, each sample once, split as in training.

    The last batch may be smaller.
    """
    n = len(dataset)
    for start in range(0, n, global_batch):
        end = min(start + global_batch, n)
        yield split.batch(dataset, np.arange(start, end), end / n)
