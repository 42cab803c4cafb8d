"""Global batches, cut for this data-parallel rank. Everything depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lowrank_dist.data.batch import Microbatch, build_microbatch, make_rows, order
from lowrank_dist.data.dataset import Dataset


@dataclass(frozen=True, eq=False)
class StepBatch:
    """This rank's share of one global batch; every rank has the same number of microbatches.

    global_targets and global_tokens count target and non-padding tokens over all ranks; global_squares is Σ length² of
    the samples, which attention's work goes with. epoch: passes over the data set once this batch is done.
    """

    microbatches: list[Microbatch]
    global_targets: int
    global_tokens: int
    global_squares: int
    epoch: float


@dataclass(frozen=True)
class Cut:
    """The layout of a global batch in rows, and the share of this data-parallel rank.

    micro_batch: rows of a microbatch. max_length: the one that the data set was loaded with (row limit of packing,
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
        """Return this rank's share of the global batch that the samples `numbers` make."""
        lengths = dataset.lengths[numbers]
        rows = make_rows(lengths.tolist(), self.max_length, self.packing)
        # Rows of like length side by side: the loss does not depend on how a batch is cut, but the padding and the
        # balance between ranks do. The sort is stable, so it is a function of the batch alone.
        rows.sort(key=lambda row: -int(lengths[row].sum()))
        group = self.micro_batch * self.dp_size
        rows += [[] for _ in range(-len(rows) % group)]
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
        return StepBatch(microbatches, targets, tokens, int(np.square(lengths).sum()), epoch)


class Loader:
    """Training batches of `global_batch` samples from the shuffled, endless stream of `dataset`."""

    def __init__(self, dataset: Dataset, cut: Cut, *, seed: int, global_batch: int) -> None:
        assert global_batch >= 1 and len(dataset) > 0 and int(dataset.lengths.max()) <= cut.max_length
        self._dataset, self._cut, self._seed, self.global_batch = dataset, cut, seed, global_batch

    def step(self, k: int) -> StepBatch:
        """Batch of optimizer step k, from 0."""
        n, size = len(self._dataset), self.global_batch
        numbers = order(self._seed, n, k * size, size)
        return self._cut.batch(self._dataset, numbers, (k + 1) * size / n)


def eval_batches(dataset: Dataset, cut: Cut, *, global_batch: int) -> Iterator[StepBatch]:
    """Every sample once, in file order, `global_batch` at a time (the last may be smaller), cut as in training."""
    n = len(dataset)
    for start in range(0, n, global_batch):
        end = min(start + global_batch, n)
        yield cut.batch(dataset, np.arange(start, end), end / n)
