"""The down-projection against float64, in any layout, dtype and mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from tests import operator_checks
from tests.operands import DTYPES, HALVES, OperatorCase, grid, operator_cases


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_at_most_twice_pytorchs(dtype: torch.dtype) -> None:
    for case in grid("down", dtype):
        case.check()


@pytest.mark.slow
@settings(max_examples=300)
@given(case=operator_cases("down"))
def test_any_problem(case: OperatorCase) -> None:
    case.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [384, 768, 1024])
def test_groups_of_large_ranks(dtype: torch.dtype, total: int) -> None:
    """R of three factors of rank 256 that share an input, and larger R."""
    OperatorCase("down", dtype, 40, 264, total, threshold=6554).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_notices_what_is_broken(dtype: torch.dtype) -> None:
    operator_checks.notices_what_is_broken("down", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_nan_contributes_nothing(dtype: torch.dtype) -> None:
    operator_checks.ignores_what_is_dropped("down", dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounds_as_pytorch(dtype: torch.dtype) -> None:
    operator_checks.rounds_as_pytorch("down", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_with_any_number_of_threads(dtype: torch.dtype) -> None:
    operator_checks.repeatable("down", dtype)


def test_notices_another_order_of_the_sums() -> None:
    operator_checks.notices_another_order("down")


def test_rows_lie_more_than_two_to_the_31_elements_apart() -> None:
    operator_checks.far_apart("down")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    operator_checks.checked_by_torch("down", dtype)


def test_what_the_operator_refuses() -> None:
    operator_checks.refuses("down")
