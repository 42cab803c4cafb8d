"""The gradient of A against float64, in any layout, dtype and mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from lowrank_dist.ops.low_rank import grad_a
from tests import operator_checks
from tests.dist import ranks
from tests.operands import DTYPES, HALVES, OperatorCase, arguments, grid, operator_cases, same_bits


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_at_most_twice_pytorchs(dtype: torch.dtype) -> None:
    for case in grid("grad_a", dtype):
        case.check()


@pytest.mark.slow
@settings(max_examples=300)
@given(case=operator_cases("grad_a"))
def test_any_problem(case: OperatorCase) -> None:
    case.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [384, 768, 1024])
def test_groups_of_large_ranks(dtype: torch.dtype, total: int) -> None:
    """R of three factors of rank 256 that share an input, and larger R."""
    OperatorCase("grad_a", dtype, 40, 264, total, threshold=6554).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_notices_what_is_broken(dtype: torch.dtype) -> None:
    operator_checks.notices_what_is_broken("grad_a", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_nan_contributes_nothing(dtype: torch.dtype) -> None:
    operator_checks.ignores_what_is_dropped("grad_a", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_columns_of_a_wider_tensor(dtype: torch.dtype) -> None:
    case = OperatorCase("grad_a", dtype, 65, 264, 12, threshold=6554)
    call = arguments(case)
    wide = torch.full((12, 270), 7.0, dtype=call["out"].dtype, device=call["out"].device)
    operator_checks.operator("grad_a")(**call | {"out": wide[:, 1:265]})
    assert same_bits(wide[:, 1:265], case.run())
    assert (wide[:, :1] == 7).all() and (wide[:, 265:] == 7).all()


def test_no_tokens_give_zeros() -> None:
    for dtype in DTYPES:
        for threshold in (0, 6554):
            found = OperatorCase("grad_a", dtype, 0, 72, 20, threshold=threshold).run()
            assert found.shape == (20, 72) and not found.any()


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_not_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    """2047 ones and a half: summed in ones, bf16 stops at 256 and fp16 at 2048."""
    u, x = (torch.ones(2048, 1, dtype=dtype, device=ranks.device()) for _ in range(2))
    x[77] = 0.5
    assert grad_a(u, x).item() == 2047.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_with_any_number_of_threads(dtype: torch.dtype) -> None:
    operator_checks.repeatable("grad_a", dtype)


def test_notices_another_order_of_the_sums() -> None:
    operator_checks.notices_another_order("grad_a")


def test_rows_lie_more_than_two_to_the_31_elements_apart() -> None:
    operator_checks.far_apart("grad_a")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    operator_checks.checked_by_torch("grad_a", dtype)


def test_what_the_operator_refuses() -> None:
    operator_checks.refuses("grad_a")
