"""DoRA's norms at the limit of fp32, where their squares underflow: gradients stay bounded, and merging agrees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_dist.merging.update import Term, Update
from lowrank_dist.methods.lora.files import LowRankFactor
from lowrank_dist.parallel.decomposed import DecomposedFactors
from lowrank_dist.parallel.factors import FactorShard
from lowrank_dist.parallel.frozen import Dense

OUT, K, T = 6, 32, 64


def started(weight: torch.Tensor) -> DecomposedFactors:
    """Return one factor on all rows, with B = 0 and magnitudes equal to the norms."""
    rows = tuple(range(OUT))
    update = DecomposedFactors(
        [FactorShard("m", 2, 1.0, rows, rows)], K, OUT, sharded_a=False, device=torch.device("cpu")
    )
    update.set_norms(update.squared_norms(Dense(nn.Parameter(weight))))
    update.start()
    return update


@pytest.mark.parametrize("scale", [0.0, 1e-36, 1e-25, 1e-21, 1e-10, 1.0])
def test_rows_of_any_size(scale: float) -> None:
    """A magnitude's gradient is at most Σ_t |dy|·‖x‖, and merging an untrained adapter does not change the base."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(OUT, K, generator=generator), torch.randn(T, K, generator=generator)
    weight[2] *= scale
    update = started(weight)
    dm = update.magnitude_gradient(torch.ones(T, OUT), x @ weight.t())
    assert (dm.abs() <= x.norm(dim=1).sum() * (1 + 1e-5)).all()
    factor = LowRankFactor(update.lora_A.detach(), torch.zeros(OUT, 2), 2.0, update.magnitude.detach())
    for transposed in (False, True):
        stored = weight.t().contiguous() if transposed else weight
        merged = Update((Term(factor, 1.0),), transposed).apply(slice(None), stored)
        torch.testing.assert_close(merged, stored, rtol=1e-2 if scale == 1e-21 else 1e-5, atol=0)


def test_the_control() -> None:
    """Control: with norms clamped to fp32's smallest normal number only, a small row's gradient exceeds the bound."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(OUT, K, generator=generator), torch.randn(T, K, generator=generator)
    weight[2] *= 1e-25
    update = started(weight)
    update.norm.copy_(update.squared_norms(Dense(nn.Parameter(weight))).sqrt().clamp(min=torch.finfo().tiny))
    dm = update.magnitude_gradient(torch.ones(T, OUT), x @ weight.t())
    assert dm[2].abs() > 1e9 * x.norm(dim=1).sum()


@pytest.mark.parametrize("gain", [1.0, 1.001, 0.2, 0.01, 1e-3, -0.01, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_gain_errs_by_one_rounding(dtype: torch.dtype, gain: float) -> None:
    """Output and input gradient are within half an ulp of the exact result: g itself is not rounded to 16 bits."""
    generator = torch.Generator().manual_seed(0)
    update = started(torch.randn(OUT, K, generator=generator))
    with torch.no_grad():
        update.magnitude.mul_(gain)
        update.set_norms(update.norm.square())
    z = torch.randn(T, OUT, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(T, OUT, generator=generator).to(dtype)
    y = update.rescaled(z, None, outside_graph=False)
    y.backward(dy)
    half_ulp = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    for found, of in ((y, z), (z.grad, dy)):
        exact = of.detach().double() * gain
        assert ((found.double() - exact).abs() <= half_ulp * exact.abs() + torch.finfo(dtype).smallest_normal).all()
