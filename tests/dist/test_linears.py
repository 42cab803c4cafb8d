"""The low-rank linears alone, in float64, against an unsharded reference: outputs and every gradient to 1e-12.

Legend: T tokens, K inputs, O outputs, N ranks; qkv is the interleaved column layout, out_proj the row layout.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_dist.arch.placement import FactorSpec, LinearPlacement
from lowrank_dist.arch.rows import LinearLayout, Part
from lowrank_dist.methods.lora.factors import AdaptedLinear, shards_of
from lowrank_dist.ops.mask import Mask, quantise
from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.dist.whole import gather_factors, spread_factors

S, B, HIDDEN, HEAD = 8, 3, 24, 4
SEED, STEP, STREAM = 5, 3, 9


def qkv_layout(heads: int, kv_heads: int) -> LinearLayout:
    rows = (heads * HEAD, kv_heads * HEAD, kv_heads * HEAD)
    parts = tuple(Part(name, f"m.{name}", n) for name, n in zip(("q", "k", "v"), rows, strict=True))
    return LinearLayout("column", HIDDEN, sum(rows), parts, "qkv", False, group=(heads // kv_heads, HEAD))


def layouts(name: str) -> LinearLayout:
    if name == "row":
        return LinearLayout("row", HIDDEN, 20, (Part("o", "m.o", 20),), "none", True)
    if name == "gate_up":
        return LinearLayout("column", HIDDEN, 32, (Part("g", "m.g", 16), Part("u", "m.u", 16)), "gate_up", False)
    return qkv_layout(*{"qkv": (4, 4), "qkv_gqa": (8, 2), "qkv_one": (4, 1)}[name])


def placement(layout: LinearLayout) -> LinearPlacement:
    """Return a placement with different r and scales by projection; k (part 1) is no target in the qkv layouts."""
    chosen = [i for i in range(len(layout.parts)) if layout.interleave != "qkv" or i != 1]
    specs = []
    for i in chosen:
        # Scales that fp32 holds exactly: the factors keep theirs in fp32.
        part, rank, scale = layout.parts[i], (3, 1, 5)[i], (2.5, 0.75, 1.5)[i]
        specs.append(
            FactorSpec(
                part.path, part.path, 0, part.rows, rank, scale * rank, scale, False, part.rows, HIDDEN, ((i, 0),)
            )
        )
    return LinearPlacement(0, "linear_qkv", layout, tuple(specs))


def linear_operands(layout: LinearLayout, zero_b: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    specs = placement(layout).factors
    return {
        "x": draw(S, B, HIDDEN),
        "dy": draw(S, B, layout.out_features),
        "w": [draw(part.rows, HIDDEN) for part in layout.parts],
        "bias": draw(layout.out_features),
        "theta": {
            spec.path: (draw(spec.adapter_rank, HIDDEN), draw(spec.rows, spec.adapter_rank) * (0 if zero_b else 1))
            for spec in specs
        },
        "rows": torch.randperm(1000, generator=generator)[: S * B].view(S, B) + 2**33,
    }


def reference(layout: LinearLayout, p: float, zero_b: bool) -> dict[str, Tensor]:
    """Compute the unsharded result by autograd, by projection: Y = X·Wᵀ + s·dropout(X)·Aᵀ·Bᵀ in part order."""
    data = linear_operands(layout, zero_b)
    x = data["x"].clone().requires_grad_()
    theta = {path: (a.clone().requires_grad_(), b.clone().requires_grad_()) for path, (a, b) in data["theta"].items()}
    mask = Mask(data["rows"].reshape(-1), torch.tensor([SEED, STEP]), STREAM, quantise(p), 0)
    dropped = x * mask.scale * mask.keep(HIDDEN).view_as(x)
    outputs = []
    for part, w in zip(layout.parts, data["w"], strict=True):
        y = x @ w.t()
        for spec in placement(layout).factors:
            if spec.path == part.path:
                a, b = theta[spec.path]
                y = y + spec.scale * (dropped @ a.t() @ b.t())
        outputs.append(y)
    y = torch.cat(outputs, dim=-1)
    if layout.bias:
        y = y + data["bias"]
    y.backward(data["dy"])
    result = {"y": y.detach(), "dx": x.grad}
    for path, (a, b) in theta.items():
        result[f"{path}.a"], result[f"{path}.b"] = a.grad, b.grad
    return result


def build(layout: LinearLayout, topology: Any) -> tuple[torch.nn.Module, AdaptedLinear]:
    """Return this rank's Megatron linear with the weights and factors, all in float64."""
    from megatron.core.model_parallel_config import ModelParallelConfig

    from lowrank_dist.parallel.factors import LowRankFactors
    from lowrank_dist.parallel.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear

    n, rank = topology.tp_size, topology.tp_rank
    device = ranks.device()
    config = ModelParallelConfig(
        tensor_model_parallel_size=n,
        sequence_parallel=topology.sequence_parallel,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        params_dtype=torch.float64,
    )
    common = {"config": config, "init_method": lambda w: w, "bias": layout.bias, "skip_bias_add": False}
    if layout.kind == "column":
        linear = LowRankColumnParallelLinear(HIDDEN, layout.out_features, tp_group=topology.tp_group, **common)
    else:
        linear = LowRankRowParallelLinear(
            HIDDEN, layout.out_features, input_is_parallel=True, tp_group=topology.tp_group, **common
        )
    linear.requires_grad_(False)
    sharded_a = layout.kind == "row"
    k = HIDDEN // n if sharded_a else HIDDEN
    factors = LowRankFactors(
        shards_of(placement(layout), rank, n), k, linear.weight.size(0), sharded_a=sharded_a, device=device
    ).double()
    return linear, AdaptedLinear(placement(layout), factors)


def run_linear(
    name: str, sequence: bool, p: float, zero_b: bool, needs_dx: bool, broken: str | None, fuse_factors: bool = False
) -> dict[str, Any]:
    """On one rank: run forward, backward and the deferred sum; return whole tensors as numpy arrays."""
    import torch.distributed as dist

    from lowrank_dist.parallel.masks import MaskSource

    topology = ranks.topology(dist.get_world_size(), sequence)
    layout, data = layouts(name), linear_operands(layouts(name), zero_b)
    n, rank, sharded = topology.tp_size, topology.tp_rank, topology.sequence_parallel
    linear, adapted = build(layout, topology)
    segments = layout.segments(rank, n)
    for segment in segments:
        w = data["w"][segment.part][segment.part_start : segment.part_start + segment.length]
        columns = slice(rank * HIDDEN // n, (rank + 1) * HIDDEN // n) if layout.kind == "row" else slice(None)
        linear.weight.data[segment.local_start : segment.local_start + segment.length] = w[:, columns]
    if layout.bias:
        linear.bias.data.copy_(data["bias"])
    spread_factors([adapted], topology, data["theta"])
    masks = MaskSource(SEED, quantise(p))
    masks.set(STEP + (broken == "mask"), data["rows"].to(ranks.device()) + (broken == "mask_row"))
    linear.attach(adapted.factors, masks, STREAM, fuse_factors)
    if broken == "stale factor":
        # Uninitialised memory may hold anything, an earlier run's factor included.
        linear.frozen._factor.zero_()
        linear.frozen.with_factor = lambda factor: linear.frozen._buffer

    tokens = slice(rank * S // n, (rank + 1) * S // n) if sharded else slice(None)
    x = data["x"][..., rank * HIDDEN // n : (rank + 1) * HIDDEN // n] if layout.kind == "row" else data["x"][tokens]
    x = x.to(ranks.device()).clone().requires_grad_(needs_dx)
    y, _ = linear(x)
    rows = global_rows(layout, rank, n)
    dy = data["dy"].to(ranks.device())
    y.backward(dy[tokens] if layout.kind == "row" else dy[..., rows])

    if n > 1 and broken != "deferred":
        for parameter in adapted.factors.parameters():
            if parameter.tp_partial_grad:
                dist.all_reduce(parameter.grad)
    gradients = gather_factors([adapted], topology.tp_group, lambda parameter: parameter.grad)
    result = {f"{path}.{k}": getattr(f, k).numpy() for path, f in gradients.items() for k in ("a", "b")}
    result["y"], result["rows"], result["tokens"] = y.detach().cpu().numpy(), rows, (tokens.start or 0)
    result["dx"] = x.grad.cpu().numpy() if needs_dx else None
    return result


def global_rows(layout: LinearLayout, rank: int, n: int) -> list[int]:
    """Return where a rank's local output rows lie among the rows of all parts, one part after the other."""
    starts = [sum(part.rows for part in layout.parts[:i]) for i in range(len(layout.parts))]
    return [starts[s.part] + s.part_start + i for s in layout.segments(rank, n) for i in range(s.length)]


def assemble(name: str, n: int, sequence: bool, results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return whole y and dx, assembled from the ranks' shards; factor gradients are whole already."""
    layout = layouts(name)
    whole = {k: torch.from_numpy(v) for k, v in results[0].items() if k.startswith("m.")}
    y = torch.zeros(S, B, layout.out_features, dtype=torch.float64)
    dx = torch.zeros(S, B, HIDDEN, dtype=torch.float64)
    for rank, result in enumerate(results):
        tokens = slice(rank * S // n, (rank + 1) * S // n) if sequence and n > 1 else slice(None)
        columns = slice(rank * HIDDEN // n, (rank + 1) * HIDDEN // n)
        if layout.kind == "column":
            y[..., result["rows"]] = torch.from_numpy(result["y"])
        else:
            y[tokens] = torch.from_numpy(result["y"])
        if result["dx"] is not None:
            part = torch.from_numpy(result["dx"])
            if layout.kind == "column":
                dx[tokens] = part
            else:
                dx[..., columns] = part
    return {**whole, "y": y, "dx": dx}


def max_relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference over all tensors, relative to the largest element of the expected tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[k] - expected[k]).abs().max() / expected[k].abs().max().clamp(min=1e-30))
        for k in expected
        if expected[k].abs().max() > 0 or found[k].abs().max() > 0
    )


CASES = list(itertools.product(("qkv", "qkv_gqa", "qkv_one", "gate_up", "row"), (1, 2, 4), (True, False)))


@pytest.mark.parametrize(("name", "n", "sequence"), CASES)
def test_equals_the_unsharded_linear(name: str, n: int, sequence: bool) -> None:
    for p, zero_b in itertools.product((0.0, 0.1), (False, True)):
        results = run_ranks(n, run_linear, name, sequence, p, zero_b, True, None)
        assert max_relative_error(assemble(name, n, sequence, results), reference(layouts(name), p, zero_b)) < 1e-12


@pytest.mark.parametrize(("name", "sequence"), list(itertools.product(("qkv_gqa", "row"), (True, False))))
def test_factors_get_their_gradient_where_the_input_needs_none(name: str, sequence: bool) -> None:
    """The lowest adapted linear: no dX is computed; dA and dB are whole."""
    results = run_ranks(2, run_linear, name, sequence, 0.1, False, False, None)
    assert all(result["dx"] is None for result in results)
    expected = reference(layouts(name), 0.1, False)
    found = assemble(name, 2, sequence, results)
    assert max_relative_error({**found, "dx": expected["dx"]}, expected) < 1e-12


@pytest.mark.parametrize(("name", "n"), list(itertools.product(("qkv_gqa", "qkv_one", "gate_up", "row"), (2, 4))))
def test_fused_factors_change_nothing(name: str, n: int) -> None:
    """One GEMM over [W ∣ b] or [W ; a] replaces two products; the lowest adapted linear has no dX to compute."""
    for p, needs_dx in itertools.product((0.0, 0.1), (True, False)):
        results = run_ranks(n, run_linear, name, True, p, False, needs_dx, None, True)
        found, expected = assemble(name, n, True, results), reference(layouts(name), p, False)
        assert max_relative_error(found if needs_dx else {**found, "dx": expected["dx"]}, expected) < 1e-12


@pytest.mark.parametrize("name", ["qkv", "row"])
def test_notices_a_factor_that_was_not_copied_into_the_buffer(name: str) -> None:
    """Negative control: the fused buffer keeps the factor's old values."""
    results = run_ranks(2, run_linear, name, True, 0.0, False, True, "stale factor", True)
    assert not max_relative_error(assemble(name, 2, True, results), reference(layouts(name), 0.0, False)) < 1e-3


@pytest.mark.parametrize("broken", ["deferred", "mask", "mask_row"])
@pytest.mark.parametrize("name", ["qkv", "row"])
def test_notices_what_is_broken(name: str, broken: str) -> None:
    """Negative controls: the deferred sum dropped, the mask of another step, the mask shifted by one row."""
    results = run_ranks(2, run_linear, name, True, 0.1, False, True, broken)
    assert max_relative_error(assemble(name, 2, True, results), reference(layouts(name), 0.1, False)) > 1e-3


def test_notices_permuted_projections() -> None:
    """Negative control: q and v of the reference exchanged."""
    results = run_ranks(2, run_linear, "qkv", True, 0.0, False, True, None)
    found = assemble("qkv", 2, True, results)
    order = [*range(2 * 16, 3 * 16), *range(16, 2 * 16), *range(16)]
    expected = reference(layouts("qkv"), 0.0, False)
    assert max_relative_error({**found, "y": found["y"][..., order]}, expected) > 1e-3
