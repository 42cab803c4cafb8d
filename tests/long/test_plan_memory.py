"""The plan's memory against a training step's, on all of SmolLM2-135M's shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.dist.test_plan_memory import TOLERANCE, Case, compare, planned, tiny, write_smollm2  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_smollm2(tmp_path_factory.mktemp("third"), num_hidden_layers=10)


@pytest.mark.parametrize(("method", "tensor"), [("full", 1), ("full", 3), ("adapter_h", 3)])
def test_measured_peak_of_the_other_methods(third: str, tiny: str, method: str, tensor: int) -> None:  # noqa: F811
    compare(third, tiny, Case(tensor, recompute=True, method=method))


def test_measured_peak_of_dora(third: str, tiny: str) -> None:  # noqa: F811
    compare(third, tiny, Case(3, recompute=False, dora=True))


def test_measured_peak_of_an_only_microbatch(third: str, tiny: str) -> None:  # noqa: F811
    """With one microbatch, activations peak before the weight gradients exist. Counting them would be an error."""
    case = Case(1, recompute=False, microbatches=1, method="full")
    assert planned(third, replace(case, microbatches=2)).total > (1 + TOLERANCE) * planned(third, case).total
    compare(third, tiny, case)


@pytest.mark.parametrize(("method", "tensor"), [("lora", 3), pytest.param("full", 1, marks=pytest.mark.nightly)])
def test_measured_peak_of_an_evaluation_that_generates(third: str, tiny: str, method: str, tensor: int) -> None:  # noqa: F811
    case = Case(tensor, recompute=True, method=method, decoded=96)
    assert planned(third, case).moment == "prompts of an evaluation"
    compare(third, tiny, case)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tensor", [1, 3])
def test_measured_peak_of_smollm2(folder: str, tiny: str, tensor: int, recompute: bool) -> None:  # noqa: F811
    compare(folder, tiny, Case(tensor, recompute))
