"""The basis of everything else, on the device under test: all collectives in use, products, dropout masks.

These tests fail first and name the part, where a whole run on the device would only be wrong. Run them with
LOWRANK_DIST_TEST_DEVICE=cuda.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.dist import ranks
from tests.dist.ranks import run_ranks

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "int64": torch.int64}


def rows_of(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return [4 · size, 3] small whole numbers, whose sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 9, (4 * size, 3), generator=generator).to(dtype)


def collectives(name: str) -> dict[str, np.ndarray]:
    """On one rank: return the results of all collectives of this package, Megatron and DeepSpeed's ZeRO, by name."""
    import torch.distributed as dist

    from lowrank_dist.parallel.collectives import all_gather_columns, all_reduce, gather_rows, reduce_scatter_rows

    group, device = dist.group.WORLD, ranks.device()
    mine = rows_of(group.rank(), group.size(), DTYPES[name]).to(device)
    found = {"gather columns": all_gather_columns(mine, group)}
    # A slow product before, a use straight after: the collective must wait for its input, the use for its result.
    heavy = torch.ones(512, 512, device=device)
    for _ in range(20):
        heavy = heavy @ heavy * (1 / 512)
    sent = mine + (heavy[0, 0] - 1).to(mine.dtype)
    gathered, work = gather_rows(sent, group)
    work.wait()
    found["gather rows"] = gathered + 0
    shard, work = reduce_scatter_rows(sent, group)
    work.wait()
    found["reduce-scatter rows"] = shard + 0
    summed = sent.clone()
    work = all_reduce(summed, group)
    work.wait()
    found["sum"] = summed + 0
    for key, call in {
        "maximum": lambda tensor: dist.all_reduce(tensor, op=dist.ReduceOp.MAX),
        "broadcast": lambda tensor: dist.broadcast(tensor, src=group.size() - 1),
        "reduce": lambda tensor: dist.reduce(tensor, 0),
    }.items():
        tensor = mine.clone()
        call(tensor)
        if key != "reduce" or group.rank() == 0:
            found[key] = tensor
    assert all(tensor.device == device for tensor in found.values())
    return {key: tensor.double().cpu().numpy() for key, tensor in found.items()}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_collectives(name: str, size: int) -> None:
    every = [rows_of(rank, size, torch.float64).numpy() for rank in range(size)]
    total = sum(every)
    for rank, found in enumerate(run_ranks(size, collectives, name)):
        expected: dict[str, Any] = {
            "gather columns": np.concatenate(every, axis=1),
            "gather rows": np.concatenate(every),
            "reduce-scatter rows": total[4 * rank : 4 * (rank + 1)],
            "sum": total,
            "maximum": np.max(every, axis=0),
            "broadcast": every[-1],
        }
        if rank == 0:
            expected["reduce"] = total
        assert found.keys() == expected.keys()
        for key in expected:
            assert (found[key] == expected[key]).all(), (rank, key)


def products(dtype: str) -> tuple[float, float]:
    """Return the largest error of the frozen product, with and without bias and into a wider message; and TF32's."""
    from lowrank_dist.ops.linear import linear, linear_into

    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((37, 256), (48, 256), (48,)))
    exact = x.double() @ weight.double().t()
    moved = [tensor.to(ranks.device(), DTYPES[dtype]) for tensor in (x, weight, bias)]
    message = moved[0].new_zeros(37, 53)
    linear_into(message[:, :48], *moved[:2])
    found = (linear(*moved[:2]), message[:, :48], linear(*moved) - moved[2], linear(moved[0], moved[1].t().t()))
    assert not message[:, 48:].any()
    gaps = [(tensor.double().cpu() - exact).abs().max() / exact.abs().max() for tensor in found]
    truncated = (x.view(torch.int32) & -(1 << 13)).view(torch.float32), (weight.view(torch.int32) & -(1 << 13))
    tf32 = truncated[0].double() @ truncated[1].view(torch.float32).double().t()
    return float(max(gaps)), float((tf32 - exact).abs().max() / exact.abs().max())


def test_products_are_full_precision() -> None:
    """fp32 is not TF32, whose error is a thousand times the allowed one."""
    found, tf32 = run_ranks(1, products, "fp32")[0]
    assert found < 2e-6 < 1e-4 < tf32
    assert run_ranks(1, products, "fp64")[0][0] < 1e-14


def masks(device: str) -> np.ndarray:
    """Return the mask as `down` draws it: ones through the identity are nonzero where they are kept."""
    from lowrank_dist.ops.low_rank import down
    from lowrank_dist.ops.mask import Mask, quantise

    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(1000, generator=generator)[:33] + 2**33
    where = ranks.device() if device == "under test" else torch.device(device)
    mask = Mask(rows.to(where), torch.tensor([5, 3], device=where), 9, quantise(0.1), 13)
    kept = torch.empty(33, 77, device=where)
    down(kept, torch.ones(33, 77, device=where), torch.eye(77, device=where), mask)
    assert torch.equal(kept != 0, mask.keep(77))
    return kept.cpu().numpy()


def test_dropout_draws_the_same_mask_as_on_a_cpu() -> None:
    """Bit for bit, although the device under test has another implementation."""
    expected = run_ranks(1, masks, "cpu")[0]
    assert 0 < (expected == 0).mean() < 0.3
    assert (run_ranks(1, masks, "under test")[0] == expected).all()


def replayed(compute: Callable[[], None]) -> Callable[[], None]:
    """Return the same work as a captured CUDA graph; on a CPU, which has none, the function itself."""
    if ranks.device().type != "cuda":
        return compute
    # Once beforehand, on another stream, as capture requires: libraries allocate on their first call.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph.replay


def linear_over_steps(tokens: int, broken: bool) -> list[bool]:
    """On one rank: capture a whole linear with dropout once and replay it over steps.

    Returns, for each step, whether the result equals eager execution.
    """
    from lowrank_dist.ops.mask import Mask, quantise
    from lowrank_dist.parallel.autograd import LocalLinear
    from lowrank_dist.parallel.factors import FactorShard, LowRankFactors
    from lowrank_dist.parallel.frozen import Dense

    device, generator = ranks.device(), torch.Generator().manual_seed(tokens)
    shards = [
        FactorShard(name, 8, 2.0, tuple(range(first, first + 64)), tuple(range(64)))
        for name, first in (("q", 0), ("v", 64))
    ]
    factors = LowRankFactors(shards, 256, 128, sharded_a=False, device=device)
    x, weight, dy = (
        torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((tokens, 256), (128, 256), (tokens, 128))
    )
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x.requires_grad_()
    key = torch.tensor([5, 0], device=device)
    mask = Mask(torch.arange(tokens, device=device), key, 9, quantise(0.25), 0)
    arguments = (x, Dense(weight), None, factors, mask, None, factors.lora_A, factors.lora_B)
    found: list[Tensor] = []

    def compute() -> None:
        y = LocalLinear.apply(*arguments)
        found[:] = [y.detach(), *torch.autograd.grad(y, (x, factors.lora_A, factors.lora_B), dy)]

    replay, equal = replayed(compute), []
    for step in range(3):
        key[1] = step + broken * (step == 2)
        replay()
        kept = [tensor.clone() for tensor in found]
        key[1] = step
        y = LocalLinear.apply(*arguments)
        expected = [y.detach(), *torch.autograd.grad(y, (x, factors.lora_A, factors.lora_B), dy)]
        equal.append(all(torch.equal(mine, theirs) for mine, theirs in zip(kept, expected, strict=True)))
    return equal


@pytest.mark.parametrize("tokens", [1, 3, 64, 1000])
def test_a_captured_graph_draws_the_mask_of_the_step_it_finds(tokens: int) -> None:
    """Forward and backward are captured once; each step number is written into device memory.

    The last case is a control.
    """
    assert run_ranks(1, linear_over_steps, tokens, False) == [[True, True, True]]
    assert run_ranks(1, linear_over_steps, tokens, True) == [[True, True, False]]
