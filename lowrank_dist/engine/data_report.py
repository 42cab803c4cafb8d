"""A report on the data sets of a run: lengths, targets, dropped samples, and the share of positions that is padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice

import numpy as np

from lowrank_dist.config import Config
from lowrank_dist.data.batches import BatchSplit, order
from lowrank_dist.data.dataset import Dataset
from lowrank_dist.data.masking import Sample
from lowrank_dist.data.tokenizer import Tokenizer, load_tokenizer
from lowrank_dist.engine.datasets import EVAL_MICROBATCHES, read_set, split_of
from lowrank_dist.engine.run_method import completed_method
from lowrank_dist.generate.texts import completion_text
from lowrank_dist.methods.method import Method

# Batches whose padding is counted: the share hardly changes after them.
_BATCHES = 200


@dataclass(frozen=True)
class ShownSample:
    """A sample to show: its line in the file, its token ids and which are targets, and its text.

    text: (part, whether its tokens are targets), in order.
    """

    line: int
    tokens: list[int]
    targets: list[bool]
    text: list[tuple[str, bool]]


@dataclass(frozen=True)
class DataSetReport:
    """The report on data.train or data.eval. Shares are between 0 and 1; lengths are in tokens, without virtual ones.

    summary: the line on kept and dropped samples, as the run prints it. fill: share of positions that are not padding,
    in the run's batches. fill_packed: the same with data.packing=true.
    """

    path: str
    samples: int
    kept: int
    too_long: int
    without_target: int
    summary: str
    lengths: dict[str, int]
    target_share: float
    fill: float
    fill_packed: float
    shown: list[ShownSample]


def report_on_data(config: Config, samples: int) -> dict[str, DataSetReport]:
    """Return the report on each data set of a run. samples: how many of each to show.

    Raises UserError as the start of the run would: for invalid lines, an unusable tokenizer or too large a length.
    """
    method, architecture = completed_method(config)
    tokenizer = load_tokenizer(config.data.tokenizer or config.model.path)
    parallel = config.parallel
    # Sequence parallelism pads rows to a multiple of its ranks. `auto` gets its size only when the ranks are known.
    pad_multiple = 1 if parallel.sequence is False or parallel.tensor == "auto" else parallel.tensor
    split = split_of(config, method, 0, parallel.data or 1, pad_multiple)
    train = read_set(config, "train", tokenizer, method, architecture)
    batches = list(islice(_train_batches(config, len(train)), _BATCHES))
    found = {"data.train": _report(train, method, tokenizer, split, batches, samples)}
    if config.data.eval is not None:
        held_out = read_set(config, "eval", tokenizer, method, architecture)
        split = replace(split, micro_batch=config.eval.micro_batch or config.train.micro_batch)
        batches = list(islice(_eval_batches(split, len(held_out)), _BATCHES))
        found["data.eval"] = _report(held_out, method, tokenizer, split, batches, samples)
    return found


def _train_batches(config: Config, n: int) -> Iterator[np.ndarray]:
    """Yield the indices of the samples of each global batch in a pass over n samples."""
    size = config.train.global_batch
    return (order(config.train.seed, n, start, size) for start in range(0, n, size))


def _eval_batches(split: BatchSplit, n: int) -> Iterator[np.ndarray]:
    """Yield the indices of the samples of each batch in an evaluation of n samples."""
    size = EVAL_MICROBATCHES * split.micro_batch * split.dp_size
    return (np.arange(start, min(start + size, n)) for start in range(0, n, size))


def _report(
    dataset: Dataset, method: Method, tokenizer: Tokenizer, split: BatchSplit, batches: list[np.ndarray], samples: int
) -> DataSetReport:
    dropped, virtual = dataset.report, len(method.virtual_token_ids)
    lengths = dataset.lengths - virtual
    percentiles = {"min": 0, "median": 50, "p95": 95, "max": 100}

    def fill(packing: bool) -> float:
        cut = replace(split, packing=packing)
        held = [dataset.lengths[numbers] for numbers in batches]
        return float(sum(part.sum() for part in held) / sum(map(cut.positions, held)))

    return DataSetReport(
        path=str(dropped.path),
        samples=dropped.total,
        kept=dropped.kept,
        too_long=dropped.too_long,
        without_target=dropped.no_target,
        summary=dropped.summary(),
        lengths={name: int(np.percentile(lengths, at, method="nearest")) for name, at in percentiles.items()},
        target_share=float(dataset.targets.sum() / lengths.sum()),
        fill=fill(split.packing),
        fill_packed=fill(True),
        shown=[_shown(dataset[number], virtual, tokenizer) for number in range(min(samples, len(dataset)))],
    )


def _shown(sample: Sample, virtual: int, tokenizer: Tokenizer) -> ShownSample:
    tokens, targets = sample.tokens[virtual:].tolist(), sample.target[virtual:].tolist()
    text, at = [], 0
    for target, run in groupby(targets):
        end = at + len(list(run))
        text.append((completion_text(tokenizer, tokens[:at], tokens[at:end]), target))
        at = end
    return ShownSample(sample.line, tokens, targets, text)
