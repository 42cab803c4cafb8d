"""The up-projection, added to its output, against float64, in any layout, dtype and mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from lowrank_dist.ops.low_rank import expand
from tests import operator_checks
from tests.dist import ranks
from tests.operands import DTYPES, HALVES, OperatorCase, arguments, grid, operator_cases


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_at_most_twice_pytorchs(dtype: torch.dtype) -> None:
    for case in grid("expand", dtype):
        case.check()


@pytest.mark.slow
@settings(max_examples=300)
@given(case=operator_cases("expand"))
def test_any_problem(case: OperatorCase) -> None:
    case.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [384, 768, 1024])
def test_groups_of_large_ranks(dtype: torch.dtype, total: int) -> None:
    """R of three factors of rank 256 that share an input, and larger R."""
    OperatorCase("expand", dtype, 40, 264, total, threshold=6554).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_notices_what_is_broken(dtype: torch.dtype) -> None:
    operator_checks.notices_what_is_broken("expand", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_dropped_it_adds_nothing(dtype: torch.dtype) -> None:
    case = OperatorCase("expand", dtype, 40, 72, 8, threshold=32768, feature_offset=3)
    keep, right = case.mask.keep(72), case.right.clone()
    right[:, 5], right[:, 6] = float("nan"), float("inf")
    found = case.run(right=right).cpu()
    assert torch.equal(found[~keep], case.initial[~keep])
    assert torch.equal(found[:, 5].isnan(), keep[:, 5]) and torch.equal(~found[:, 6].isfinite(), keep[:, 6])
    rest = [k for k in range(72) if k not in (5, 6)]
    assert torch.equal(found[:, rest], case.run().cpu()[:, rest])


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_accumulate_out_is_not_read(dtype: torch.dtype) -> None:
    """out starts as NaN; the result equals that of adding to zeros."""
    for threshold in (0, 6554, 65536):
        fresh = OperatorCase("expand", dtype, 65, 264, 12, threshold=threshold, message=(3, 2, 1), accumulate=False)
        added = arguments(fresh) | {"accumulate": True}
        assert not added["out"].any()
        operator_checks.operator("expand")(**added)
        assert torch.equal(fresh.run(), added["out"])


@pytest.mark.parametrize("dtype", HALVES)
def test_rounds_once_after_the_sum(dtype: torch.dtype) -> None:
    """1 + half a step + far less. If the product were rounded first, the sum would be a tie, which rounds to 1."""
    step = torch.finfo(dtype).eps
    u = torch.tensor([[1.0, 2.0**-6]], dtype=dtype, device=ranks.device())
    a = torch.tensor([[step / 2], [step / 2**7]], dtype=dtype, device=ranks.device())
    for columns in (1, 200):
        out = torch.ones(1, columns, dtype=dtype, device=ranks.device())
        expand(out, u, a.expand(2, columns))
        assert (out == 1 + step).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_rounds_as_pytorch(dtype: torch.dtype) -> None:
    operator_checks.rounds_as_pytorch("expand", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_with_any_number_of_threads(dtype: torch.dtype) -> None:
    operator_checks.repeatable("expand", dtype)


def test_notices_another_order_of_the_sums() -> None:
    operator_checks.notices_another_order("expand")


def test_rows_lie_more_than_two_to_the_31_elements_apart() -> None:
    operator_checks.far_apart("expand")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    operator_checks.checked_by_torch("expand", dtype)


def test_what_the_operator_refuses() -> None:
    operator_checks.refuses("expand")
