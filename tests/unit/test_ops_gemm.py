"""The frozen GEMM against float64: within plain PyTorch's worst-case bound, for any layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.ops.linear import linear, linear_into, linear_ref


def relative_error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Return the largest error over the largest product of magnitudes, the scale of a dot product's rounding."""
    exact = linear_ref(x.double(), weight.double(), None if bias is None else bias.double())
    scale = linear_ref(x.double().abs(), weight.double().abs()).max() + 1
    return float((found.double() - exact).abs().max() / scale)


def operands(t: int, k: int, o: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(t * 1000003 + k * 1009 + o)
    x = torch.randn(t, k + 5, generator=generator)
    weight = torch.randn(o, k, generator=generator)
    if layout == "sliced input":
        return x[:, 2 : 2 + k], weight
    if layout == "transposed weight":
        return x[:, :k].contiguous(), weight.t().contiguous().t()
    if layout == "sliced weight":
        return x[:, :k].contiguous(), torch.randn(o, k + 3, generator=generator)[:, :k]
    return x[:, :k].contiguous(), weight


LAYOUTS = ("dense", "sliced input", "transposed weight", "sliced weight")


@given(
    t=st.integers(0, 70), k=st.integers(1, 300), o=st.integers(1, 130), layout=st.sampled_from(LAYOUTS), b=st.booleans()
)
def test_error_against_float64(t: int, k: int, o: int, layout: str, b: bool) -> None:
    x, weight = operands(t, k, o, layout)
    bias = torch.linspace(-1, 1, o) if b else None
    found = linear(x, weight, bias)
    assert found.shape == (t, o) and found.is_contiguous() and found.dtype == torch.float32
    if t:
        # k·ε/2 bounds a dot product of length k in any order of summation (Higham 2002, §3.1).
        assert relative_error(found, x, weight, bias) <= max(k, 8) * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_plain_pytorch(dtype: torch.dtype) -> None:
    x, weight = (tensor.to(dtype) for tensor in operands(9, 33, 17, "dense"))
    assert torch.equal(linear(x, weight), linear_ref(x, weight))


def test_into_columns_of_a_message() -> None:
    x, weight = operands(9, 33, 17, "dense")
    message = torch.full((9, 20), 7.0)
    linear_into(message[:, 2:19], x, weight)
    assert torch.equal(message[:, 2:19], linear(x, weight))
    assert (message[:, :2] == 7).all() and (message[:, 19:] == 7).all()


def test_notices_a_lost_input() -> None:
    """Negative control: one input feature left out of sixty-four is far outside the bound."""
    x, weight = operands(9, 64, 17, "dense")
    assert relative_error(linear(x[:, 1:], weight[:, 1:].contiguous()), x, weight, None) > 1e-3
