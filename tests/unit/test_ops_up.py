"""The products with B against float64: block-diagonal on a CPU, dense through cuBLAS on CUDA.

Legend: T tokens, O outputs, R ranks; `FACTORS` lists the rows of a fused weight that each factor's B covers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_dist.ops.low_rank import up, up_grad_b, up_grad_u
from lowrank_dist.parallel.factors import LowRankFactors
from tests.dist import ranks
from tests.low_rank import FACTORS, factors_of
from tests.operands import DTYPES, HALVES, draw, error_over_tolerance, fp32_tolerance, place, same_bits

TOKENS = [0, 1, 2, 63, 65, 127, 129, 2047]


def check(product: str, factors: LowRankFactors, dtype: torch.dtype, tokens: int, broken: bool = False) -> float:
    """Return a product's error over the allowed error. broken: zero the ranks after the first factor."""
    generator = torch.Generator().manual_seed(tokens)
    outputs, total = factors.out_features, factors.total_rank
    u, dy = (draw(tokens, n, generator=generator, dtype=dtype) for n in (total, outputs))
    y = draw(tokens, outputs, generator=generator, dtype=dtype)
    bt = factors.dense_bt(dtype)
    inside = factors.dense_bt(torch.float64).cpu() != 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def plain(to: torch.dtype, device: torch.device) -> Tensor:
        b, *rest = (t.to(device, to) for t in (bt, u, dy, y))
        if product == "up":
            return torch.addmm(rest[2], rest[0], b)
        return rest[1] @ b.t() if product == "grad_u" else rest[0].t() @ rest[1]

    given = bt.clone()
    if broken:
        given[factors.shards[0].adapter_rank :] = 0
    if product == "grad_b":
        used = u.clone()
        used[:, factors.shards[0].adapter_rank :] *= not broken
        found = up_grad_b(place(dy, "columns"), place(used, "columns"), factors.blocks)
        assert found.dtype == wide and found.shape == bt.shape
    else:
        width = total if product == "grad_u" else outputs
        message = torch.full((tokens, width + 5), float("nan"), dtype=dtype, device=ranks.device())
        out = message[:, 3 : 3 + width]
        if product == "grad_u":
            up_grad_u(out, place(dy, "columns"), given, factors.blocks)
        else:
            out.copy_(y)
            up(out, place(u, "columns"), given, factors.blocks)
        found = out.clone()
        out.fill_(float("nan"))
        assert same_bits(message, torch.full_like(message, float("nan"))), "something around out was written"
    exact = plain(torch.float64, torch.device("cpu"))
    to = wide if product == "grad_b" else dtype
    theirs = exact if dtype == torch.float64 else plain(to, ranks.device())
    if product == "grad_b":
        found, theirs, exact = (t.cpu()[inside] for t in (found, theirs, exact))
    b2, u2, dy2, y2 = (t.cpu().double().square() for t in (bt, u, dy, y))
    terms = {"up": lambda: u2 @ b2 + y2, "grad_u": lambda: dy2 @ b2.t(), "grad_b": lambda: u2.t() @ dy2}[product]()
    largest = terms.max().sqrt().item() if terms.numel() else 0.0
    allowed = 1e-13 if dtype == torch.float64 else fp32_tolerance(exact.numel())
    if product == "grad_b" and dtype in HALVES and ranks.device().type == "cuda":
        # cuBLAS sums these on tensor cores, which truncate every partial sum; plain fp32 rounds to nearest.
        allowed += tokens / 32 * torch.finfo(torch.float32).eps
    return error_over_tolerance(found, theirs, exact, allowed * largest)


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", ["up", "grad_u", "grad_b"])
def test_error_at_most_twice_pytorchs(product: str, dtype: torch.dtype, kind: str) -> None:
    factors = factors_of(kind, 8, torch.float64 if dtype == torch.float64 else torch.float32)
    for tokens in TOKENS:
        assert check(product, factors, dtype, tokens) <= 1, tokens


@pytest.mark.parametrize("product", ["up", "grad_u", "grad_b"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_notices_a_factor_that_is_left_out(product: str, dtype: torch.dtype) -> None:
    factors = factors_of("mixed", 8, torch.float64 if dtype == torch.float64 else torch.float32)
    assert check(product, factors, dtype, 65, broken=True) > 2


@pytest.mark.parametrize("kind", FACTORS)
def test_blocks_are_where_the_dense_form_is_not_zero(kind: str) -> None:
    factors = factors_of(kind, 8, torch.float32)
    dense, covered = factors.dense_bt(torch.float32).cpu(), torch.zeros(factors.total_rank, factors.out_features)
    blocks = factors.blocks or (0, factors.out_features, 0, factors.total_rank)
    for i in range(0, len(blocks), 4):
        column, columns, rank, ranks_ = blocks[i : i + 4]
        covered[rank : rank + ranks_, column : column + columns] += 1
    assert torch.equal(covered, (dense != 0).float())
    first = 0
    for i, shard in enumerate(factors.shards):
        block = dense[first : first + shard.adapter_rank, list(shard.local_rows)]
        assert torch.equal(block.t(), factors.b_of(i).detach().cpu())
        first += shard.adapter_rank
    # Back in packed storage every element is where it came from.
    (packed,) = factors.up_gradients(factors.dense_bt(torch.float32))
    stored = sum(len(shard.local_rows) * shard.adapter_rank for shard in factors.shards)
    assert torch.equal(packed[:stored], factors.lora_B.detach()[:stored]) and packed.dtype == torch.float32
