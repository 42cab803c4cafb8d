"""benchmarks/overhead.py: its statistics, its count of saved bytes, its checks against PEFT, the model's arithmetic.

On a CPU, in a world whose other ranks are fake (sides.join_fake_world). Sizes are those of the shape "tiny".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lowrank_dist.backend.select import select_backend
from lowrank_dist.parallel.topology import Topology

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import checks  # noqa: E402
import overhead  # noqa: E402
import rivals  # noqa: E402
import roofline  # noqa: E402
import sides  # noqa: E402

TOKENS, R = 24, 4
Layers = dict[tuple[str, int], sides.Layer]


@pytest.fixture(scope="module")
def layers() -> Iterator[Layers]:
    """Yield the layers by dtype and number of shards."""
    device = select_backend("cpu").device
    assert sides.join_fake_world() == {"gather_copies": True, "reduce_scatter_copies": True}
    topologies = {shard: Topology.build(shard, None, shard > 1, 60) for shard in (1, sides.WORLD)}
    yield {
        (name, shard): sides.Layer("tiny", TOKENS, dtype, device, topology)
        for name, dtype in sides.DTYPES.items()
        for shard, topology in topologies.items()
    }
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_the_figure_is_the_median_difference_over_the_twins_median() -> None:
    twin = [1.0, 2.0, 3.0, 4.0, 10.0]
    constant = overhead.paired([seconds + 0.5 for seconds in twin], twin)
    assert constant == {"median": pytest.approx(0.5 / 3), "low": pytest.approx(0.5 / 3), "high": pytest.approx(0.5 / 3)}
    differences = [0.1, -0.2, 0.3, 0.4, 9.0]
    scattered = overhead.paired([a + b for a, b in zip(twin, differences, strict=True)], twin)
    assert scattered["median"] == pytest.approx(0.3 / 3)
    assert (scattered["low"], scattered["high"]) == (pytest.approx(-0.2 / 3), pytest.approx(9.0 / 3))


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        noise = torch.empty(40).exponential_(generator=generator).tolist()
        figure = overhead.paired([1 + x for x in noise], [1.0] * 40)
        covered += figure["low"] <= 0.6931 <= figure["high"]  # the median of the exponential distribution: ln 2
    assert 88 <= covered <= 100


def test_every_round_has_every_side_and_every_place_is_taken_by_each() -> None:
    rounds = [overhead.order(5, number) for number in range(10)]
    assert all(sorted(sides_of) == list(range(5)) for sides_of in rounds)
    assert all({sides_of[place] for sides_of in rounds} == set(range(5)) for place in range(5))
    followers = {(a, b) for sides_of in rounds for a, b in zip(sides_of, sides_of[1:], strict=False)}
    assert {(0, 1), (1, 0)} <= followers


@dataclass
class Aside:
    """An object that a context might hold, with a tensor inside."""

    inside: list[Tensor]


class SavesTensors(torch.autograd.Function):
    """Saves a view of 3 of 50 elements and, by attribute, 7 elements in a dataclass, the weight and its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(torch.zeros(50)[:3], weight, x)
        ctx.aside, ctx.weight, ctx.again = Aside([torch.zeros(7)]), weight, x[1:]
        return x * 1

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def test_saved_bytes_are_those_of_distinct_storages_whole() -> None:
    x, weight = torch.zeros(11, requires_grad=True), torch.zeros(100)
    assert checks.saved_bytes(lambda: [SavesTensors.apply(x, weight)], [weight]) == 4 * (50 + 7 + 11)
    assert checks.saved_bytes(lambda: [SavesTensors.apply(x, weight)], []) == 4 * (50 + 7 + 11 + 100)
    assert checks.saved_bytes(lambda: [SavesTensors.apply(SavesTensors.apply(x, weight), weight)], [weight]) == 4 * (
        57 + 57 + 22
    )
    module = torch.nn.Identity()
    module.aside = torch.zeros(5)
    assert checks.saved_bytes(lambda: [x * 2], [], [module]) == 4 * 5


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "shard"), [(dtype, shard) for dtype in sides.DTYPES for shard in (1, 8)])
def test_the_sides_agree_and_ours_saves_inputs_and_u(layers: Layers, dtype: str, shard: int, p: float) -> None:
    layer = layers[dtype, shard]
    found = layer.sides(R, p)
    # An unusual stride in a dimension of size 1 makes torch use slower kernels; this was seen with PEFT's layer.
    assert all(x.stride() == torch.empty(x.shape).stride() for side in found for x in (*side.inputs, *side.grads))
    agreement = checks.require_same(layer, found, dtype, True)
    assert agreement.keys() == {"ours", "ours_lanes"} if shard > 1 else {"ours"}
    assert all(differences.keys() == {"y", "dx", "factors"} for differences in agreement.values())
    saved = checks.count_saved(layer, found, R)
    # Each rank saves its share of every input. U has all tokens before qkv and fc1 (R = 3r, 2r), else a shard's (r, r).
    expected = (3 * 64 + 176) / shard + (5 + 2 / shard) * R
    assert saved["ours"] == expected * layer.dtype.itemsize
    assert saved["peft"] >= saved["ours"] * (1 if p == 0 else 2)


def test_a_wrong_factor_is_seen(layers: Layers) -> None:
    """Negative control: one projection's B is off by 2 %, in fp32; and factors that PEFT does not have, in bf16."""
    ours, adapted = layers["fp32", 1].ours(R, 0.0)
    peft, _ = layers["fp32", 1].peft(adapted, R, 0.0)
    adapted[0].factors.b_of(1).data.mul_(1.02)
    with pytest.raises(SystemExit, match="differs from PEFT"):
        checks.require_same(layers["fp32", 1], [ours, peft], "fp32", True)
    ours, adapted = layers["bf16", 1].ours(R, 0.0)
    peft, _ = layers["bf16", 1].peft(adapted, R, 0.0)
    adapted[3].factors.lora_A.data.neg_()
    with pytest.raises(SystemExit, match="differs from PEFT"):
        checks.require_same(layers["bf16", 1], [ours, peft], "bf16", True)


def test_a_byte_too_many_is_seen(layers: Layers) -> None:
    """Negative control: dropout that saves a mask."""
    layer = layers["bf16", 1]
    ours, _ = layer.ours(R, 0.1)
    wasteful = replace(ours, forward=lambda inputs: ours.forward([torch.dropout(x, 0.1, True) for x in inputs]))
    with pytest.raises(SystemExit, match="ours saves"):
        checks.count_saved(layer, [wasteful], R)


def test_eager_is_what_autograd_makes_of_it(layers: Layers) -> None:
    layer = layers["fp32", 1]
    ours, adapted = layer.ours(R, 0.0)
    peft, _ = layer.peft(adapted, R, 0.0)
    checks.require_same(layer, [layer.eager(adapted, 0.1), peft], "fp32", True)
    x, w, a, bt = (
        torch.randn(*size, dtype=torch.float64, requires_grad=size != (5, 8))
        for size in ((6, 8), (5, 8), (3, 8), (3, 5))
    )
    torch.manual_seed(2)
    y = rivals.EagerLinear.apply(x, w, a, bt, 0.3)
    torch.manual_seed(2)
    expected = x @ w.t() + torch.native_dropout(x, 0.3, True)[0] @ a.t() @ bt
    dy = torch.randn(6, 5, dtype=torch.float64)
    assert torch.allclose(y, expected)
    pairs = zip(*(torch.autograd.grad(out, (x, a, bt), dy) for out in (y, expected)), strict=True)
    assert all(torch.allclose(mine, theirs) for mine, theirs in pairs)


def test_the_model_counts_passes() -> None:
    """One linear by hand: K 64, O 64, T 24, r 4, whole and as one shard of 8."""
    proj = sides.architecture("tiny").layers[0].linears["linear_proj"]
    x = y = TOKENS * 64
    u = TOKENS * R
    whole = roofline.passes(proj, 1, TOKENS, R)
    assert whole == {"down": x + u, "up": y + u, "dU": y + u, "expand": x + u, "grad_a": x + u, "dB": y + u}
    shard = roofline.passes(proj, 8, TOKENS, R)
    assert (shard["down"], shard["up"], shard["message"]) == (x // 8 + u, 2 * y // 8 + u // 8, 2 * y // 8 + 2 * u // 8)


def test_the_model_is_bytes_over_bandwidth_over_flops_and_marked() -> None:
    gpu = roofline.Gpu("slow", flops=1e6, bandwidth=1e6)
    row = roofline.modelled("tiny", 1, gpu, TOKENS, R)
    weights = 64 * (3 * 64) + 64 * 64 + 64 * 2 * 176 + 176 * 64
    inputs, outputs = 3 * 64 + 176, 3 * 64 + 64 + 2 * 176 + 64
    elements = TOKENS * (3 * inputs + 3 * outputs + 6 * 7 * R)
    assert row["modelled_frozen_seconds"] == pytest.approx(4 * TOKENS * weights / 1e6)
    assert row["modelled_overhead"] == pytest.approx(2 * elements / (4 * TOKENS * weights))
    assert row["modelled"] is True and all(name.startswith("modelled") for name in row)
