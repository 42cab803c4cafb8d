"""The checkpoint of one layout is resumed in every other layout, at both ZeRO stages.

Ten layouts save once. Each shape is resumed in each shape, which covers every pair of stages; make test-nightly runs
all hundred pairs of layouts.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.integration.resuming import SAVED, TOLERANCE, Layout, gap, make_job, stopped_after, tensors, train

SHAPES = {"TP1": (1, 1, 4), "TP2": (2, 1, 4), "TP2xDP2": (2, 2, 2), "TP4": (4, 1, 8), "DP4": (1, 4, 1)}
LAYOUTS = {f"{name}, ZeRO {zero}": Layout(t, d, zero, rows) for name, (t, d, rows) in SHAPES.items() for zero in (1, 2)}


def pairs() -> list[Any]:
    """Return (source, target) of every two layouts; for each two shapes, one pair of stages is not nightly.

    The stages alternate, and change between the two where the source comes later: 1 → 1, 2 → 2, 1 → 2 and 2 → 1.
    """
    often = set()
    for (i, source), (j, target) in itertools.product(enumerate(SHAPES), repeat=2):
        saved = 1 + (i + j) % 2
        often.add((f"{source}, ZeRO {saved}", f"{target}, ZeRO {saved if i <= j else 3 - saved}"))
    return [
        pytest.param(*pair, marks=() if pair in often else pytest.mark.nightly)
        for pair in itertools.product(LAYOUTS, repeat=2)
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def runs(job: Path) -> dict[str, Path]:
    found = {name: job.parent / name for name in LAYOUTS}
    for name, layout in LAYOUTS.items():
        assert {outcome.code for outcome in train(job, found[name], layout)} == {0}
    return found


@pytest.mark.parametrize(("source", "target"), pairs())
def test_each_to_each(job: Path, runs: dict[str, Path], source: str, target: str, tmp_path: Path) -> None:
    stopped = stopped_after(runs[source], SAVED, tmp_path / "run")
    outcomes = train(job, stopped, LAYOUTS[target])
    assert {outcome.code for outcome in outcomes} == {0}, outcomes[0].stderr
    assert f"at step {SAVED} of" in outcomes[0].stdout
    found = tensors(stopped)
    assert gap(found, tensors(runs["TP1, ZeRO 1"])) < TOLERANCE
    if source == target:
        assert gap(found, tensors(runs[source])) == 0
