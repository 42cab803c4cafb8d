"""The samples that a run reads: each once a pass, wherever the run was stopped and however it resumes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_dist.checkpoint.training_state import DataState, TrainingState
from lowrank_dist.config.schema import TrainConfig
from lowrank_dist.data.batches import BatchSplit, Loader, StepBatch
from lowrank_dist.data.dataset import Dataset
from lowrank_dist.engine.datasets import StreamRange, note_on_batch, note_on_idle_ranks
from lowrank_dist.engine.run import Progress
from tests.unit.test_data_loader import make_dataset

Read = list[list[int]]


def state_of(dataset: Dataset, progress: Progress, train: TrainConfig, **changes: Any) -> TrainingState:
    """Return the state in a checkpoint of the run."""
    facts = {name: getattr(progress, name) for name in Progress.__dataclass_fields__}
    state = TrainingState(
        **{**facts, "loss": 1.0},
        eval_losses={},
        data=DataState(path="train.jsonl", sha256=dataset.sha256, samples=len(dataset)),
        held_out=None,
        rng={},
        config={"train": train.model_dump(mode="json")},
        base_fingerprint="ab",
        ranks={},
        versions={},
    )
    return state.model_copy(update=changes)


def run(
    dataset: Dataset, train: TrainConfig, resumed: TrainingState | None, steps: int | None = None, dp_size: int = 1
) -> tuple[Read, TrainingState]:
    """Read a run's batches from `resumed` to its end, or to `steps`. Return the samples of each step, and the state at
    the end. Every data-parallel rank has the same number of microbatches.
    """
    stream_range = StreamRange.of(train, dataset, resumed)
    splits = [
        BatchSplit(train.micro_batch, int(dataset.lengths.max()), False, rank, dp_size, 1) for rank in range(dp_size)
    ]
    loaders = [
        Loader(dataset, split, seed=train.seed, global_batch=train.global_batch, end=stream_range.end)
        for split in splits
    ]
    progress, read = Progress.of(resumed, stream_range.position), []
    while progress.step < (stream_range.steps if steps is None else steps):
        shares = [loader.batch(progress.position) for loader in loaders]
        assert len({len(share.microbatches) for share in shares}) == 1
        read.append(sorted(number for share in shares for number in numbers_in(dataset, share)))
        assert len(read[-1]) == shares[0].samples
        progress = progress.after(shares[0], 1.0)
    return read, state_of(dataset, progress, train)


def numbers_in(dataset: Dataset, batch: StepBatch) -> list[int]:
    """Return the sample numbers of a batch with one sample a row; tokens of `make_dataset` are unique."""
    number = {int(dataset[i].tokens[0]): i for i in range(len(dataset))}
    return [number[first] for m in batch.microbatches for first in m.input_ids[:, 0].tolist() if first]


def once(read: Read, n: int, passes: int = 1) -> bool:
    return Counter(number for step in read for number in step) == Counter(passes * [*range(n)])


@pytest.mark.parametrize(
    ("n", "epochs", "batch", "sizes"),
    [
        (9, 1, 32, [9]),
        (9, 2, 4, [4, 4, 4, 4, 2]),
        (9, 2, 32, [18]),
        (9, 1, 3, [3, 3, 3]),
        (9, 0.5, 4, [4, 1]),
        (30, 0.1, 2, [2, 1]),
        (1, 0.01, 8, [1]),
    ],
)
def test_a_run_by_epochs_reads_no_more_than_its_passes(n: int, epochs: float, batch: int, sizes: list[int]) -> None:
    dataset = make_dataset([3] * n)
    read, state = run(dataset, TrainConfig(epochs=epochs, global_batch=batch), None)
    assert [len(step) for step in read] == sizes
    assert state.epoch == sum(sizes) / n and state.samples == state.position == sum(sizes)
    if epochs >= 1:
        assert once(read, n, int(epochs))


def test_a_run_by_steps_has_whole_batches() -> None:
    """Control: without a number of passes a run continues into the next pass."""
    read, state = run(make_dataset([3] * 9), TrainConfig(steps=3, global_batch=8), None)
    assert [len(step) for step in read] == [8, 8, 8] and state.epoch == 24 / 9


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 20),
    passes=st.integers(1, 3),
    batches=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    dp_sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 9),
    stop=st.integers(0, 99),
)
def test_every_sample_once_a_pass_wherever_a_run_stops(
    n: int, passes: int, batches: tuple[int, int], dp_sizes: tuple[int, int], seed: int, stop: int
) -> None:
    dataset = make_dataset([2 + i % 5 for i in range(n)])
    first, then = (TrainConfig(epochs=passes, global_batch=batch, seed=seed) for batch in batches)
    steps = math.ceil(passes * n / batches[0])
    before, state = run(dataset, first, None, max(1, stop % (steps + 1)), dp_sizes[0])
    after, end = run(dataset, then, state, None, dp_sizes[1])
    assert once(before + after, n, passes)
    assert end.epoch == passes and end.step == len(before) + len(after)
    # With an unchanged config it reads the same samples as without a stop.
    assert before + run(dataset, first, state)[0] == run(dataset, first, None)[0]


def test_another_batch_goes_on_where_the_data_stopped() -> None:
    dataset = make_dataset([3] * 40)
    before, state = run(dataset, TrainConfig(epochs=1, global_batch=4), None, 5)
    for batch, steps in ((8, 3), (7, 3), (2, 10), (40, 1)):
        train = TrainConfig(epochs=1, global_batch=batch)
        after, end = run(dataset, train, state)
        assert once(before + after, 40) and (len(after), end.step) == (steps, 5 + steps)
        assert StreamRange.of(train, dataset, state).notes == [
            "train.global_batch was 4 up to step 5: the data continues after 0.50 passes"
        ]
    # The same with train.steps, whose value stays.
    after, end = run(dataset, TrainConfig(steps=7, global_batch=10), state)
    assert once(before + after, 40) and end.step == 7


def test_a_checkpoint_without_a_position_stood_at_step_times_its_batch() -> None:
    """In old checkpoints of a run that changed its batch size, `samples` is not the position in the data."""
    dataset = make_dataset([3] * 40)
    before, state = run(dataset, TrainConfig(epochs=1, global_batch=4), None, 5)
    old = state.model_copy(update={"position": None, "samples": 12})
    assert once(before + run(dataset, TrainConfig(epochs=1, global_batch=8), old)[0], 40)
    # A run that had finished, with more samples than its passes have, stays finished.
    small, train = make_dataset([3] * 9), TrainConfig(epochs=1, global_batch=32)
    finished = state_of(small, Progress(step=1, samples=32, epoch=32 / 9), train, position=None)
    assert StreamRange.of(train, small, finished).steps == 1
    assert old.model_copy(update={"config": {}}).stream_position == 12, "nothing better is known"
    assert old.model_copy(update={"updates": None}).updates_made == old.step == 5


def test_other_data_is_read_from_its_beginning() -> None:
    dataset, other = make_dataset([3] * 12), make_dataset([4] * 15)
    train = TrainConfig(epochs=1, global_batch=4)
    _, state = run(dataset, train, None, 2)
    stream_range = StreamRange.of(train, other, state)
    assert stream_range.notes == [
        "data.train was another file up to step 2: the new one is read from its beginning, and passes count from zero"
    ]
    after, end = run(other, train, state)
    assert once(after, 15) and (end.step, end.epoch, end.samples) == (2 + 4, 1.0, 8 + 15)
    # A run stopped within the new data resumes to the same samples.
    within, then = run(other, train, state, 4)
    assert within + run(other, train, then)[0] == after and StreamRange.of(train, other, then).notes == ()


def test_another_seed_begins_the_pass_again() -> None:
    dataset = make_dataset([3] * 12)
    _, state = run(dataset, TrainConfig(epochs=3, global_batch=4), None, 5)
    other = TrainConfig(epochs=3, global_batch=4, seed=7)
    after, end = run(dataset, other, state)
    assert once(after, 12, passes=2) and end.epoch == 3
    assert "pass 2 over the data starts again in a new order" in StreamRange.of(other, dataset, state).notes[0]


def test_a_run_that_ends_before_its_checkpoint_is_seen() -> None:
    dataset = make_dataset([3] * 12)
    _, state = run(dataset, TrainConfig(epochs=3, global_batch=4), None, 5)
    assert StreamRange.of(TrainConfig(epochs=1, global_batch=4), dataset, state).steps < 5
    assert StreamRange.of(TrainConfig(epochs=4, global_batch=4), dataset, state).steps == 12


@pytest.mark.parametrize(
    ("length", "batch", "said"),
    [({"epochs": 3}, 32, True), ({"steps": 1}, 10, True), ({"epochs": 1}, 32, False), ({"steps": 5}, 9, False)],
)
def test_a_step_of_more_than_a_pass_is_said(length: dict[str, int], batch: int, said: bool) -> None:
    dataset, train = make_dataset([3] * 9), TrainConfig(**length, global_batch=batch)
    notes = note_on_batch(train, len(dataset), StreamRange.of(train, dataset, None))
    assert bool(notes) == said and all("is more than the 9 samples" in note for note in notes)


@pytest.mark.parametrize(
    ("micro", "ranks", "idle"), [(8, 2, 1), (4, 2, 0), (2, 8, 4), (4, 4, 2), (1, 8, 0), (1, 16, 8)]
)
def test_ranks_without_samples_are_named(micro: int, ranks: int, idle: int) -> None:
    train, dataset = TrainConfig(steps=1, global_batch=8, micro_batch=micro), make_dataset([3] * 8)
    shares = [
        BatchSplit(micro, 16, False, rank, ranks, 1).batch(dataset, np.arange(8), 0.0).microbatches
        for rank in range(ranks)
    ]
    assert sum(not any(len(batch.target_ids) for batch in share) for share in shares) == idle
    notes = note_on_idle_ranks(train, ranks)
    assert bool(notes) == bool(idle) and all(note.startswith(f"{idle} of {ranks} ") for note in notes)
