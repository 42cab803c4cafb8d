"""Order, packing and sharding: every target once with its own context, however a batch is split."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_dist.data.batches import BatchSplit, Loader, Microbatch, StepBatch, eval_batches, order
from lowrank_dist.data.dataset import Dataset, DropReport
from lowrank_dist.data.masking import Sample

Context = tuple[int, ...]


def make_dataset(lengths: list[int], seed: int = 0) -> Dataset:
    """Return samples whose tokens are unique (from 1 on: 0 is padding), with random targets and at least one each."""
    rng, samples, first = np.random.default_rng(seed), [], 1
    for line, length in enumerate(lengths, start=1):
        target = rng.random(length) < 0.5
        target[0], target[-1] = False, length > 1
        samples.append(Sample(np.arange(first, first + length, dtype=np.int32), target, line))
        first += length
    n = len(samples)
    return Dataset(samples, DropReport(Path("made"), 0, n, n, 0, (), 0, (), max(lengths), {}))


def wanted(dataset: Dataset, numbers: Iterable[int]) -> Counter[tuple[Context, int]]:
    """Return the samples' (context within the sample, target) pairs, straight from the definition of the loss."""
    pairs: Counter[tuple[Context, int]] = Counter()
    for number in numbers:
        sample = dataset[number]
        for t in range(1, len(sample.tokens)):
            if sample.target[t]:
                pairs[tuple(sample.tokens[:t].tolist()), int(sample.tokens[t])] += 1
    return pairs


def found(microbatches: Iterable[Microbatch]) -> Counter[tuple[Context, int]]:
    """Return the same pairs from the tensors alone: position_ids say which tokens are a position's context."""
    pairs: Counter[tuple[Context, int]] = Counter()
    for m in microbatches:
        b = m.input_ids.shape[0]
        for flat, target in zip(m.target_index.tolist(), m.target_ids.tolist(), strict=True):
            q, r = divmod(flat, b)
            start = q - int(m.position_ids[r, q])
            pairs[tuple(m.input_ids[r, start : q + 1].tolist()), target] += 1
    return pairs


def dropout_map(microbatches: Iterable[Microbatch]) -> Counter[tuple[int, int]]:
    """Return the (dropout row, token) pairs of all real tokens."""
    return Counter(
        (row, token)
        for m in microbatches
        for row, token in zip(m.dropout_rows.T.flatten().tolist(), m.input_ids.flatten().tolist(), strict=True)
        if token != 0
    )


def check_shape(m: Microbatch, packing: bool, max_length: int, pad_multiple: int) -> None:
    b, s = m.input_ids.shape
    assert m.position_ids.shape == (b, s) and m.dropout_rows.shape == (s, b) and s % pad_multiple == 0
    tensors = (m.input_ids, m.position_ids, m.target_index, m.target_ids, m.dropout_rows)
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in tensors)
    real = m.input_ids != 0
    longest = int(real.sum(1).max())
    assert s == max(pad_multiple, -(-longest // pad_multiple) * pad_multiple) and longest <= max_length
    assert not (real[:, 1:] & ~real[:, :-1]).any(), "padding comes last"
    assert not m.position_ids[~real].any() and not m.dropout_rows.T[~real].any()
    assert (m.target_index[1:] > m.target_index[:-1]).all()
    if not packing:
        assert m.segments is None
        expected = torch.arange(s).expand(b, s) * real
        assert torch.equal(m.position_ids, expected)
        return
    assert m.segments is not None
    for r in range(b):
        pieces = sorted((start, end) for row, start, end in m.segments if row == r)
        assert pieces[0][0] == 0 and pieces[-1][1] == s
        assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False)) and all(a < e for a, e in pieces)
        for start, end in pieces:
            inside = real[r, start:end]
            assert inside.all() or not inside.any()
            if inside.any():
                assert m.position_ids[r, start:end].tolist() == list(range(end - start))


splits = st.fixed_dictionaries(
    {
        "micro_batch": st.integers(1, 4),
        "packing": st.booleans(),
        "pad_multiple": st.sampled_from([1, 2, 4, 7]),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=17),
    extra=st.integers(0, 9),
    global_batch=st.integers(1, 24),
    dp_size=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(0, 5),
    split=splits,
)
def test_every_target_once_over_ranks_and_microbatches(
    lengths: list[int], extra: int, global_batch: int, dp_size: int, seed: int, k: int, split: dict[str, int]
) -> None:
    dataset, max_length = make_dataset(lengths, seed), max(lengths) + extra
    numbers = order(seed, len(dataset), k * global_batch, global_batch)
    batches = []
    for dp_rank in range(dp_size):
        ours = BatchSplit(max_length=max_length, dp_rank=dp_rank, dp_size=dp_size, **split)
        batches.append(Loader(dataset, ours, seed=seed, global_batch=global_batch).batch(k * global_batch))
    everything = [m for batch in batches for m in batch.microbatches]
    assert len({len(batch.microbatches) for batch in batches}) == 1
    assert {m.input_ids.shape[0] for m in everything} == {split["micro_batch"]}
    for m in everything:
        check_shape(m, bool(split["packing"]), max_length, split["pad_multiple"])
    pairs = found(everything)
    assert pairs == wanted(dataset, numbers)
    assert {batch.global_targets for batch in batches} == {pairs.total()}
    assert {batch.global_tokens for batch in batches} == {int(dataset.lengths[numbers].sum())}
    assert batches[0].epoch == pytest.approx((k + 1) * global_batch / len(dataset))
    # A dropout row is the sample's slot in the global batch and the position in it, however the batch is split.
    rows = {(slot * max_length + p, int(t)) for slot, i in enumerate(numbers) for p, t in enumerate(dataset[i].tokens)}
    assert dropout_map(everything) == Counter(rows)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=17),
    global_batch=st.integers(1, 20),
    dp_size=st.integers(1, 4),
    split=splits,
)
def test_evaluation_sees_every_sample_once(
    lengths: list[int], global_batch: int, dp_size: int, split: dict[str, int]
) -> None:
    dataset = make_dataset(lengths)
    shares = [BatchSplit(max_length=max(lengths), dp_rank=r, dp_size=dp_size, **split) for r in range(dp_size)]
    ranks = [list(eval_batches(dataset, ours, global_batch=global_batch)) for ours in shares]
    assert {len(batches) for batches in ranks} == {-(-len(dataset) // global_batch)}
    flat: list[StepBatch] = [batch for batches in ranks for batch in batches]
    assert found(m for batch in flat for m in batch.microbatches) == wanted(dataset, range(len(dataset)))
    assert sum(batch.global_targets for batch in ranks[0]) == int(dataset.targets.sum())
    assert ranks[0][-1].epoch == 1.0
    for at, together in enumerate(zip(*ranks, strict=True)):
        assert found(m for b in together for m in b.microbatches) == wanted(
            dataset, range(at * global_batch, min((at + 1) * global_batch, len(dataset)))
        )


def one_microbatch(packing: bool) -> tuple[Dataset, Microbatch]:
    dataset = make_dataset([5, 3, 7, 2])
    split = BatchSplit(2 if packing else 4, max_length=10, packing=packing, dp_rank=0, dp_size=1, pad_multiple=4)
    (microbatch,) = Loader(dataset, split, seed=1, global_batch=4).batch(0).microbatches
    return dataset, microbatch


@pytest.mark.parametrize("packing", [False, True])
def test_controls_each_kind_of_damage_is_seen(packing: bool) -> None:
    dataset, m = one_microbatch(packing)
    right = wanted(dataset, range(4))
    assert found([m]) == right
    b = m.input_ids.shape[0]
    tampered = {
        "target one position late": dataclasses.replace(m, target_index=m.target_index + b),
        "target in the next row": dataclasses.replace(m, target_index=m.target_index ^ 1),
        "row-major index": dataclasses.replace(
            m, target_index=(m.target_index % b) * m.input_ids.shape[1] + m.target_index // b
        ),
        "inputs as targets": dataclasses.replace(m, target_ids=m.target_ids - 1),
        "one target lost": dataclasses.replace(m, target_index=m.target_index[1:], target_ids=m.target_ids[1:]),
        "positions one off": dataclasses.replace(m, position_ids=(m.position_ids - 1).clamp(min=0)),
    }
    if packing:
        tampered["positions run on"] = dataclasses.replace(
            m, position_ids=torch.arange(m.input_ids.shape[1]).expand_as(m.input_ids)
        )
    for name, broken in tampered.items():
        assert found([broken]) != right, name
    assert found([m, m]) != right


def test_control_segments_that_leave_something_out_are_seen() -> None:
    _, m = one_microbatch(packing=True)
    check_shape(m, True, 10, 4)
    assert m.segments is not None
    for segments in (m.segments[1:], m.segments[:-1], tuple((r, s, e - 1) for r, s, e in m.segments)):
        with pytest.raises(AssertionError):
            check_shape(dataclasses.replace(m, segments=segments), True, 10, 4)


def test_dropout_rows_agree_packed_and_unpacked() -> None:
    packed, unpacked = one_microbatch(True)[1], one_microbatch(False)[1]
    assert dropout_map([packed]) == dropout_map([unpacked])
    moved = dataclasses.replace(packed, dropout_rows=packed.dropout_rows.roll(1, 0))  # control
    assert dropout_map([moved]) != dropout_map([unpacked])


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    dataset = make_dataset([3, 4, 5, 6, 7])
    split = BatchSplit(micro_batch=2, max_length=9, packing=True, dp_rank=0, dp_size=1, pad_multiple=2)

    def loader() -> Loader:
        return Loader(dataset, split, seed=9, global_batch=4)

    walked = loader()
    for k in range(6):
        one, two = walked.batch(4 * k), loader().batch(4 * k)
        for a, b in zip(one.microbatches, two.microbatches, strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.target_index, b.target_index)
            assert torch.equal(a.dropout_rows, b.dropout_rows) and a.segments == b.segments


def test_rows_of_like_length_share_a_microbatch() -> None:
    dataset = make_dataset([2, 30] * 8)
    splits = [BatchSplit(4, 32, packing=False, dp_rank=rank, dp_size=2, pad_multiple=1) for rank in range(2)]
    ranks = [Loader(dataset, split, seed=3, global_batch=16).batch(0).microbatches for split in splits]
    assert [[m.input_ids.shape[1] for m in microbatches] for microbatches in ranks] == [[30, 2], [30, 2]]


def test_a_step_takes_well_under_a_millisecond_a_sample() -> None:
    dataset = make_dataset([100 + i % 300 for i in range(2000)])
    split = BatchSplit(8, 512, packing=True, dp_rank=0, dp_size=1, pad_multiple=8)
    loader = Loader(dataset, split, seed=3, global_batch=64)
    loader.batch(0)
    start = time.process_time()  # CPU time: other work on the machine does not count
    for k in range(1, 11):
        loader.batch(64 * k)
    assert (time.process_time() - start) / (10 * 64) < 0.5e-3
