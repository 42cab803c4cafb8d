"""Host memory of ranks whose batches never have the same shape twice: flat after a while, and as planned."""

from __future__ import annotations

import os
import random
from functools import partial
from unittest import mock

import pytest

from lowrank_dist.backend.libraries import CACHES
from tests.dist.ranks import World
from tests.dist.test_plan_memory import (  # noqa: F401
    LENGTH,
    ROWS,
    TOLERANCE,
    Case,
    built,
    malloc_gives_back,
    planned,
    ready,
    resident,
    sampled,
    tiny,
    write_smollm2,
)

STEPS, SETTLED = 300, 30


def steps_of_packed_rows(folder: str, case: Case, steps: int) -> list[int]:
    """On one rank: train on microbatches with rows and numbers of targets as packing makes them, up to the largest.

    Returns the anonymous bytes after every step.
    """
    import torch

    model, theta, optimiser = built(folder, case)
    draw, generator, after = random.Random(1), torch.Generator().manual_seed(1), []
    for step in range(steps):
        for index in range(case.microbatches):
            largest = case.length // case.tensor * case.tensor
            length = (
                largest if step % 10 == 9 else draw.randrange(3 * largest // 4, largest) // case.tensor * case.tensor
            )
            count = ROWS * (length - 1)
            targets = count if step % 10 == 9 else draw.randrange(count // 2, count)
            ids = torch.randint(5, 1000, (ROWS, length), generator=generator)
            chosen = torch.randperm(count, generator=generator)[:targets].sort().values
            positions = torch.arange(length).expand(ROWS, length)
            wanted = ids[:, 1:].t().flatten()[chosen]
            loss = partial(model.loss, ids, positions, chosen, wanted)
            optimiser.accumulate(loss, 1 / targets, index + 1 == case.microbatches)
        optimiser.step(1e-3)
        theta.refresh()
        after.append(resident())
    return after


def grown(folder: str, steps: int, caches: dict[str, str]) -> list[float]:
    """Return the MiB after each step in excess of those after step SETTLED."""
    inherited = {name: value for name, value in os.environ.items() if name not in CACHES}
    with mock.patch.dict(os.environ, {**inherited, **caches}, clear=True), malloc_gives_back():
        world = World(1, fresh=True)
    try:
        (after,) = world.run(steps_of_packed_rows, (folder, Case(1, recompute=False), steps), seconds=900)
    finally:
        world.close()
    return [(size - after[SETTLED - 1]) / 2**20 for size in after]


def test_memory_is_flat_once_it_has_settled(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_smollm2(tmp_path_factory.mktemp("small"), num_hidden_layers=1, vocab_size=1024)
    found = grown(folder, STEPS, {})
    assert max(found[SETTLED:]) < 32, found[::10]
    # Control: with the libraries' own bounds, which the user may set, memory keeps growing.
    control = grown(folder, 3 * SETTLED, dict.fromkeys(CACHES, "1024"))
    assert max(control[SETTLED:]) > 64, control[::10]


@pytest.mark.parametrize("tensor", [1, 3])
def test_measured_peak_of_varying_shapes(tmp_path_factory: pytest.TempPathFactory, tiny: str, tensor: int) -> None:  # noqa: F811
    folder = write_smollm2(tmp_path_factory.mktemp("third"), num_hidden_layers=10)
    compare_varying(folder, tiny, Case(tensor, recompute=False, microbatches=1), 20)


@pytest.mark.nightly
def test_measured_peak_of_varying_shapes_of_smollm2(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> None:  # noqa: F811
    """All layers, on three ranks, in packed rows of 160."""
    folder = write_smollm2(tmp_path_factory.mktemp("whole"))
    compare_varying(folder, tiny, Case(3, recompute=False, length=160), 10)


def compare_varying(folder: str, tiny: str, case: Case, steps: int) -> None:  # noqa: F811
    with malloc_gives_back():
        world = World(case.tensor, fresh=True)
    try:
        baselines = world.run(ready, (tiny, case))
        _, peaks = sampled(world, steps_of_packed_rows, (folder, case, steps))
    finally:
        world.close()
    expected = planned(folder, case).total
    for peak, baseline in zip(peaks, baselines, strict=True):
        assert abs(expected / (peak - baseline) - 1) < TOLERANCE, (expected, peak - baseline)
