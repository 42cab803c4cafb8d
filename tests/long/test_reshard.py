"""Every layout's checkpoint goes on in every other layout, at both ZeRO stages: ten saved once, a hundred loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.resuming import SAVED, TOLERANCE, Layout, gap, make_job, stopped_after, tensors, train

SHAPES = {"TP1": (1, 1, 4), "TP2": (2, 1, 4), "TP2xDP2": (2, 2, 2), "TP4": (4, 1, 8), "DP4": (1, 4, 1)}
LAYOUTS = {f"{name}, ZeRO {zero}": Layout(t, d, zero, rows) for name, (t, d, rows) in SHAPES.items() for zero in (1, 2)}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def runs(job: Path) -> dict[str, Path]:
    found = {name: job.parent / name for name in LAYOUTS}
    for name, layout in LAYOUTS.items():
        assert {outcome.code for outcome in train(job, found[name], layout)} == {0}
    return found


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_each_to_each(job: Path, runs: dict[str, Path], source: str, target: str, tmp_path: Path) -> None:
    stopped = stopped_after(runs[source], SAVED, tmp_path / "run")
    outcomes = train(job, stopped, LAYOUTS[target])
    assert {outcome.code for outcome in outcomes} == {0}, outcomes[0].stderr
    assert f"at step {SAVED} of" in outcomes[0].stdout
    found = tensors(stopped)
    assert gap(found, tensors(runs["TP1, ZeRO 1"])) < TOLERANCE
    if source == target:
        assert gap(found, tensors(runs[source])) == 0
