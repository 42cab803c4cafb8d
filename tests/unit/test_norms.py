"""Norms of 1 + weight, and over all heads, against transformers' modules: outputs and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from lowrank_dist.model.norms import HeadsNorm, ZeroCenteredNorm

DTYPES = [torch.float32, torch.bfloat16]
EPS = 0.03
ONE_RANK: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output_and_gradients(module: Any, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of input and weight."""
    x = x.clone().requires_grad_()
    with torch.no_grad():
        module.weight.copy_(weight)
    y = module(x)
    y.backward(drawn(*y.shape, seed=3).to(y.dtype))
    return [y.detach(), x.grad, module.weight.grad]


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_one_plus_weight_is_gemma_s(dtype: torch.dtype) -> None:
    x, weight = drawn(7, 2, 96, seed=1).to(dtype), 0.3 * drawn(96, seed=2).to(dtype)
    expected = output_and_gradients(Gemma3RMSNorm(96, EPS).to(dtype), x, weight)
    found = output_and_gradients(ZeroCenteredNorm(96, EPS).to(dtype), x, weight)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs)
    # Control: the weight alone.
    plain = output_and_gradients(ZeroCenteredNorm(96, EPS).to(dtype), x, weight - 1)
    assert (plain[0] - expected[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_over_all_heads_is_olmo_s(dtype: torch.dtype) -> None:
    """Six query heads and two key heads of 8, on one rank. Several ranks: tests/dist/test_methods.py."""
    config: Any = SimpleNamespace(
        kv_channels=8, num_query_groups=2, num_attention_heads=6, layernorm_epsilon=EPS, params_dtype=dtype
    )
    ours = HeadsNorm(config, ONE_RANK)
    q, k = (drawn(7, 2, heads * 8, seed=heads).to(dtype) for heads in (6, 2))
    weights = {48: drawn(48, seed=1).to(dtype), 16: drawn(16, seed=2).to(dtype)}
    expected = [output_and_gradients(Olmo2RMSNorm(x.size(-1), EPS).to(dtype), x, weights[x.size(-1)]) for x in (q, k)]
    with torch.no_grad():
        ours.query.weight.copy_(weights[48])
        ours.key.weight.copy_(weights[16])
    inputs = [x.clone().requires_grad_() for x in (q, k)]
    outputs = ours(*(x.unflatten(-1, (-1, 8)) for x in inputs))
    flat = [y.flatten(2) for y in outputs]
    torch.autograd.backward(flat, [drawn(*y.shape, seed=3).to(dtype) for y in flat])
    for y, x, module, (output, dx, d_weight) in zip(flat, inputs, (ours.query, ours.key), expected, strict=True):
        for found, theirs in ((y.detach(), output), (x.grad, dx), (module.weight.grad, d_weight)):
            torch.testing.assert_close(found, theirs)
    # Control: a norm of each head by itself.
    each = q.float().unflatten(-1, (-1, 8))
    alone = (each * torch.rsqrt(each.square().mean(-1, keepdim=True) + EPS)).flatten(2) * weights[48].float()
    assert (alone - expected[0][0]).abs().max() > 0.1


def test_saves_inputs_as_they_are() -> None:
    """The plan counts the input and one fp32 number of each row (planner/activations.py)."""
    saved: list[Tensor] = []
    x = drawn(7, 2, 96, seed=1).bfloat16().requires_grad_()
    norm = ZeroCenteredNorm(96, EPS).bfloat16().requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    assert {tuple(tensor.shape): tensor.dtype for tensor in saved} == {
        (7, 2, 96): torch.bfloat16,
        (96,): torch.bfloat16,
        (7, 2, 1): torch.float32,
    }
