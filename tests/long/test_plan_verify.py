"""The plan against the executed step, on fake tensors of the largest models."""

from __future__ import annotations

import pytest

from tests.unit.test_plan_verify import agrees_at_tp_8


@pytest.mark.parametrize("name", ["llama-3-70b", "llama-3-405b"])
def test_the_largest_models(name: str) -> None:
    agrees_at_tp_8(name, "all-linear")
