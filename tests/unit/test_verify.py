"""Comparison of two trainings: bounds in fp32 and bf16, the first difference, and values that are not numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from lowrank_dist.verify.compare import FP32, Record, compare, first_difference, largest

Q, DOWN = "layers.0.q_proj", "layers.0.down_proj"


def record(**changes: Any) -> Record:
    gradients = {f"{name}.lora_A": torch.tensor([1.0, -2.0]) for name in (Q, DOWN)}
    values = Record({Q: torch.ones(2, 3), DOWN: torch.ones(2, 4)}, [2.0], [0.5], [gradients], {"a": torch.ones(3)})
    return replace(values, **changes)


def test_equal_records_agree() -> None:
    differences = compare(record(), record(), None)
    assert first_difference(differences) is None and len(differences) == 7
    assert [each.quantity for each in largest(differences)] == list(record().quantities())


def test_the_first_module_in_the_order_of_execution_is_named() -> None:
    """An input that differs comes before the gradients that follow from it; of gradients, backward's first."""
    wrong = {f"{name}.lora_A": torch.tensor([1.0, -1.0]) for name in (Q, DOWN)}
    found = first_difference(compare(record(gradients=[wrong]), record(), None))
    assert found is not None and (found.quantity, found.name) == ("gradients, step 1", f"{DOWN}.lora_A")
    inputs = {Q: torch.ones(2, 3), DOWN: torch.zeros(2, 4)}
    found = first_difference(compare(record(gradients=[wrong], inputs=inputs), record(), None))
    assert found is not None and (found.quantity, found.name) == ("inputs of linears", DOWN)


def test_bounds() -> None:
    for factor, agrees in ((0.9, True), (1.1, False)):
        changed = record(losses=[2.0 * (1 + factor * FP32)])
        assert (first_difference(compare(changed, record(), None)) is None) == agrees
    # In bf16, four times the error of the reference in bf16.
    rounded = record(losses=[2.0 * 1.01])
    for error, agrees in ((0.039, True), (0.041, False)):
        changed = record(losses=[2.0 * (1 + error)])
        assert (first_difference(compare(changed, record(), rounded)) is None) == agrees


def test_nothing_passes_for_lack_of_a_number() -> None:
    """NaN, a tensor that is missing and one of another shape differ."""
    for changed in (
        record(losses=[math.nan]),
        record(exported={}),
        record(exported={"a": torch.ones(3), "b": torch.ones(1)}),
        record(exported={"a": torch.ones(4)}),
        record(exported={"a": torch.tensor([1.0, math.nan, 1.0])}),
    ):
        found = first_difference(compare(changed, record(), None))
        assert found is not None
        assert not next(
            each for each in largest(compare(changed, record(), None)) if each.quantity == found.quantity
        ).agrees


def test_a_gradient_that_is_zero_but_for_rounding_is_not_held_against_itself() -> None:
    noise = {Q: torch.tensor([1e-9]), DOWN: torch.tensor([1.0])}
    other = {Q: torch.tensor([-1e-9]), DOWN: torch.tensor([1.0])}
    assert first_difference(compare(record(gradients=[noise]), record(gradients=[other]), None)) is None
