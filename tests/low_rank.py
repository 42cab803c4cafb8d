"""One adapted linear without process groups: its factors, a test case for its gradients, and plain PyTorch's result.

Legend: T tokens, K inputs, O outputs, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dist.ops.mask import Mask, quantise
from lowrank_dist.parallel.autograd import LocalLinear
from lowrank_dist.parallel.factors import FactorShard, LowRankFactors
from lowrank_dist.parallel.frozen import Dense
from tests.dist import ranks
from tests.operands import draw, error_over_tolerance, fp32_tolerance, on_device

NAMES = ["y", "dx", "da", "db"]
K = 264
# Kind → (O, factors as (r, scale, local rows)). Rows without a factor, runs of rows, rows out of order.
# Scales that fp32, in which the factors keep them, holds exactly.
FACTORS: dict[str, tuple[int, list[tuple[int, float, list[int]]]]] = {
    "dense": (200, [(12, 1.6875, list(range(200)))]),
    "mixed": (
        300,
        [(3, 2.25, [*range(64), *range(130, 200)]), (7, 0.6875, list(range(64, 129))), (1, 1.125, [299, 201])],
    ),
    "groups": (
        192,
        [(8, 1.3125, [i for i in range(192) if i % 24 < 16]), (5, 0.875, [i for i in range(192) if i % 24 > 19])],
    ),
    "one without rows": (72, [(4, 1.3125, list(range(5, 72))), (6, 2.0, [])]),
    "no rows at all": (40, [(3, 1.5, [])]),
}


def factors_of(kind: str, inputs: int, dtype: torch.dtype) -> LowRankFactors:
    """Return random factors on the tested device, with values that are exact in every dtype and B ≠ 0."""
    outputs, parts = FACTORS[kind]
    shards = [FactorShard(str(i), r, s, tuple(rows), tuple(range(len(rows)))) for i, (r, s, rows) in enumerate(parts)]
    factors = LowRankFactors(shards, inputs, outputs, sharded_a=False, device=ranks.device()).to(dtype)
    generator = torch.Generator().manual_seed(len(kind))
    for parameter in factors.parameters():
        values = draw(*parameter.shape, generator=generator, dtype=torch.float64).div(4).bfloat16().half()
        parameter.data.copy_(values)
    return factors


def plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, factors: LowRankFactors, mask: Mask | None
) -> Tensor:
    """Compute Y = X·Wᵀ + bias + Σ s·(dropout(X)·Aᵀ)·Bᵀ, factor by factor, as PEFT does; differentiable."""
    y = torch.nn.functional.linear(x, weight, bias)
    dropped = x
    if mask is not None:
        dropped = x * mask.keep(x.size(-1)).to(x.device).view_as(x) * mask.scale
    for i, shard in enumerate(factors.shards):
        rows = torch.tensor(shard.local_rows, dtype=torch.int64, device=x.device)
        update = dropped @ factors.a_of(i, a).t().to(x.dtype) @ factors.b_of(i, b).t().to(x.dtype)
        y = y.index_add(-1, rows, update * shard.scale)
    return y


@dataclass
class Linear:
    """One test case: the inputs of a linear and the gradient of its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    factors: LowRankFactors
    mask: Mask | None
    dy: Tensor

    def apply(self, x: Tensor) -> Tensor:
        factors = self.factors
        return local_linear(x, self, on_device(self.mask), factors.lora_A, factors.lora_B)

    def ours(self) -> dict[str, Tensor]:
        """Return y and every gradient."""
        self.factors.zero_grad()
        x = self.x.clone().requires_grad_()
        y = self.apply(x)
        y.backward(self.dy)
        grads = [x.grad, self.factors.lora_A.grad, self.factors.lora_B.grad]
        return dict(zip(NAMES, [y.detach(), *grads], strict=True))

    def plain(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Return the same from plain PyTorch. Θ stays fp32, as in PEFT's mixed precision, or is float64."""
        master = torch.float64 if dtype == torch.float64 else torch.float32
        x = self.x.to(device, dtype, copy=True).requires_grad_()
        a, b = (
            t.detach().to(device, master, copy=True).requires_grad_()
            for t in (self.factors.lora_A, self.factors.lora_B)
        )
        weight, dy = self.weight.to(device, dtype), self.dy.to(device, dtype)
        bias = None if self.bias is None else self.bias.to(device, dtype)
        y = plain_linear(
            x, weight, bias, a, b, self.factors, on_device(self.mask) if device.type != "cpu" else self.mask
        )
        y.backward(dy)
        return dict(zip(NAMES, [y.detach(), x.grad, a.grad, b.grad], strict=True))


def local_linear(x: Tensor, linear: Linear, mask: Mask | None, a: Tensor, b: Tensor) -> Tensor:
    """Return the linear of the case; its backward accumulates into `a` and `b`."""
    return LocalLinear.apply(x, Dense(linear.weight), linear.bias, linear.factors, mask, None, a, b)


def linear_case(
    dtype: torch.dtype,
    kind: str = "mixed",
    p: float = 0.1,
    bias: bool = True,
    shape: tuple[int, ...] = (13, 5),
    k: int = K,
) -> Linear:
    generator, device = torch.Generator().manual_seed(3), ranks.device()
    outputs = FACTORS[kind][0]

    def drawn(*size: int) -> Tensor:
        return draw(*size, generator=generator, dtype=dtype).to(device)

    rows = torch.randint(0, 2**40, (torch.Size(shape).numel(),), generator=torch.Generator().manual_seed(3))
    mask = Mask(rows, torch.tensor([5, 3]), 9, quantise(p), 0) if p else None
    factors = factors_of(kind, k, torch.float64 if dtype == torch.float64 else torch.float32)
    return Linear(
        drawn(*shape, k),
        drawn(outputs, k) / 16,
        drawn(outputs) if bias else None,
        factors,
        mask,
        drawn(*shape, outputs),
    )


def max_error_over_tolerance(linear: Linear, dtype: torch.dtype, found: dict[str, Tensor]) -> float:
    """The largest `error_over_tolerance` of y and the gradients, by the rule of tests/operands.py.

    A sum of random terms is about as large as their Euclidean norm, for which the RMS of the exact result is used.
    """
    exact = linear.plain(torch.float64, torch.device("cpu"))
    theirs = exact if dtype == torch.float64 else linear.plain(dtype, ranks.device())
    largest = 0.0
    for name in NAMES:
        assert found[name].shape == exact[name].shape and found[name].dtype == theirs[name].dtype, name
        if exact[name].numel():
            unit = 1e-13 if dtype == torch.float64 else fp32_tolerance(exact[name].numel())
            floor = unit * exact[name].square().mean().sqrt().item()
            # As a tensor, whose maximum is NaN where one element is.
            found_error = error_over_tolerance(found[name], theirs[name], exact[name], floor)
            largest = torch.tensor([largest, found_error]).max().item()
    return largest
