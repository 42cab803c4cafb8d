"""Autograd of one adapted linear on local tensors: errors, all gradients, accumulation, recompute, evaluation.

Legend: T tokens, K inputs, O outputs.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowrank_dist.ops import extension
from lowrank_dist.ops.linear import linear as frozen
from lowrank_dist.ops.mask import Mask, quantise
from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.low_rank import FACTORS, NAMES, K, linear_case, local_linear, max_error_over_tolerance
from tests.operands import draw, on_device, same_bits


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5])
@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_error_at_most_twice_pytorchs(dtype: torch.dtype, kind: str, p: float) -> None:
    """Inputs of two and three dimensions, with and without a bias."""
    # Twice half an ulp is one ulp; PyTorch's largest error of so few elements is a little under half an ulp.
    most = 1.0 if ranks.device().type == "cpu" else 1.01
    for shape, bias in (((13, 5), True), ((129,), False)):
        linear = linear_case(dtype, kind, p, bias, shape)
        assert max_error_over_tolerance(linear, dtype, linear.ours()) <= most, (shape, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_pytorch_in_place_of_the_operators(dtype: torch.dtype) -> None:
    linear = linear_case(dtype)
    compiled = linear.ours()
    extension.use_plain(True)
    try:
        plain = linear.ours()
    finally:
        extension.use_plain(False)
    assert max_error_over_tolerance(linear, dtype, plain) <= 1
    assert any(not same_bits(plain[name], compiled[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_dropped_is_the_frozen_linear(dtype: torch.dtype) -> None:
    linear = linear_case(dtype, p=1.0)
    found = linear.ours()
    # On CUDA the frozen product is added to the low-rank product's zeros, which may use another algorithm.
    tolerance = {"rtol": 0, "atol": 0} if ranks.device().type == "cpu" else {}
    for name, expected in (
        ("y", frozen(linear.x.flatten(0, 1), linear.weight, linear.bias)),
        ("dx", frozen(linear.dy.flatten(0, 1), linear.weight.t())),
    ):
        torch.testing.assert_close(found[name].flatten(0, 1), expected, **tolerance)
    assert not found["da"].any() and not found["db"].any()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (13, 0)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    for p in (0.0, 0.1):
        linear = linear_case(torch.float32, shape=shape, p=p)
        found = linear.ours()
        assert found["y"].shape == (*shape, 300) and found["dx"].shape == (*shape, K)
        assert not found["da"].any() and not found["db"].any()


def test_an_input_of_any_strides() -> None:
    linear = linear_case(torch.float32)
    expected = linear.ours()
    x, dy = linear.x, linear.dy
    for place in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.repeat(1, 1, 2)[..., : t.size(-1)],
    ):
        linear.x, linear.dy = place(x), place(dy)
        assert not linear.x.is_contiguous()
        assert all(torch.allclose(found, expected[name], 1e-5, 1e-4) for name, found in linear.ours().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_every_subset_of_gradients(needs: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    """Each requested gradient equals the one computed with all others, bit for bit; no other is computed."""
    linear = linear_case(dtype)
    expected = linear.ours()
    linear.factors.zero_grad()
    x = linear.x.clone().requires_grad_(needs[0])
    linear.factors.lora_A.requires_grad_(needs[1])
    linear.factors.lora_B.requires_grad_(needs[2])
    y = linear.apply(x)
    assert same_bits(y.detach(), expected["y"]) and y.requires_grad == any(needs)
    if any(needs):
        y.backward(linear.dy)
    leaves = (x, linear.factors.lora_A, linear.factors.lora_B)
    for leaf, need, name in zip(leaves, needs, NAMES[1:], strict=True):
        assert same_bits(leaf.grad, expected[name]) if need else leaf.grad is None, name
    assert linear.weight.grad is None and linear.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_there_already_is_added_to(dtype: torch.dtype) -> None:
    linear = linear_case(dtype)
    first = linear.ours()
    grads = {"da": linear.factors.lora_A, "db": linear.factors.lora_B}
    for parameter in grads.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    held = {name: parameter.grad for name, parameter in grads.items()}
    x = linear.x.clone().requires_grad_()
    linear.apply(x).backward(linear.dy)
    linear.apply(x).backward(linear.dy)
    assert same_bits(x.grad, first["dx"] + first["dx"])
    for name, parameter in grads.items():
        assert parameter.grad is held[name] and parameter.grad.dtype == torch.float32
        assert same_bits(parameter.grad, 0.5 + first[name] + first[name])


@pytest.mark.parametrize("kind", ["mixed", "dense"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(kind: str, p: float) -> None:
    linear = linear_case(torch.float64, kind, p, shape=(2, 2), k=9)
    factors = linear.factors

    def apply(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # The linear reads Θ from its own storage.
        factors.lora_A.data, factors.lora_B.data = a.detach(), b.detach()
        return local_linear(x, linear, on_device(linear.mask), a, b)

    inputs = [t.detach().clone().requires_grad_() for t in (linear.x, factors.lora_A, factors.lora_B)]
    assert torch.autograd.gradcheck(apply, inputs)
    # The control: forward and backward use masks of different steps.
    if p:
        key = on_device(linear.mask).key

        def stale(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            key[1] = 3
            factors.lora_A.data, factors.lora_B.data = a.detach(), b.detach()
            mask = Mask(linear.mask.rows.to(key.device), key, 9, linear.mask.threshold, 0)
            y = local_linear(x, linear, mask, a, b)
            key[1] = 4
            return y

        assert not torch.autograd.gradcheck(stale, inputs, raise_exception=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mistake", ["no 1/(1 - p)", "another mask", "a rank left out", "scales exchanged", "a stale B"]
)
def test_notices_what_is_broken(dtype: torch.dtype, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = linear_case(dtype)
    assert max_error_over_tolerance(linear, dtype, linear.ours()) <= 1
    mask, factors = linear.mask, linear.factors
    if mistake == "no 1/(1 - p)":
        monkeypatch.setattr(Mask, "scale", 1.0)
    elif mistake == "another mask":
        linear.mask = Mask(mask.rows, mask.key, mask.stream, mask.threshold, 1)
    elif mistake == "a rank left out":
        a = factors.lora_A.data.clone()
        factors.lora_A.data[4] = 0
    elif mistake == "scales exchanged":
        factors.scale[[2, 3]] = factors.scale[[3, 2]]
    else:
        dense = factors.dense_bt(dtype)
        dense[:, 0] = 0
        monkeypatch.setattr(factors, "dense_bt", lambda _: dense)
    found = linear.ours()
    monkeypatch.undo()
    linear.mask = mask
    if mistake == "a rank left out":
        factors.lora_A.data = a
    assert max_error_over_tolerance(linear, dtype, found) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_draws_the_same_mask(dtype: torch.dtype) -> None:
    """Non-reentrant checkpointing gives the same output and gradients, bit for bit."""
    linear = linear_case(dtype, p=0.5)
    expected = linear.ours()
    linear.factors.zero_grad()
    x = linear.x.clone().requires_grad_()
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return linear.apply(x) * 1

    y = checkpoint(counted, x, use_reentrant=False)
    y.backward(linear.dy)
    assert len(calls) == 2, "it was computed again"
    found = [y.detach(), x.grad, linear.factors.lora_A.grad, linear.factors.lora_B.grad]
    assert all(same_bits(*pair) for pair in zip(found, expected.values(), strict=True))
    # The control: a mask that changes between forward and recompute.
    linear.mask = Mask(linear.mask.rows, linear.mask.key + len(calls), 9, linear.mask.threshold, 0)
    assert not same_bits(linear.ours()["da"], expected["da"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeatable_with_any_number_of_threads(dtype: torch.dtype) -> None:
    """Θ's gradients do not depend on the number of threads; y and dX follow the frozen product's library."""
    linear = linear_case(dtype, shape=(700,))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            found.append(linear.ours())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert same_bits(other["da"], found[0]["da"]) and same_bits(other["db"], found[0]["db"])


def test_what_is_saved_for_backward() -> None:
    """The input, and U of width R, are saved; no mask and no dropped input. The frozen weight exists anyway."""
    linear = linear_case(torch.bfloat16)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        linear.apply(linear.x.clone().requires_grad_())
    assert saved == [(13, 5, K), (65, linear.factors.total_rank)]


def on_a_world_of_one(dtype: torch.dtype) -> dict[str, bool]:
    """Check the column-parallel module on one rank in training, in evaluation and without dropout."""
    from lowrank_dist.parallel.masks import MaskSource
    from tests.dist.test_linears import HIDDEN, B, S, build, layouts

    linear, adapted = build(layouts("qkv"), ranks.topology(1, False))
    generator, device = torch.Generator().manual_seed(0), ranks.device()
    linear.to(dtype)
    factors = adapted.factors.float()
    for parameter in (linear.weight, *factors.parameters()):
        parameter.data.copy_(draw(*parameter.shape, generator=generator, dtype=dtype))
    x = draw(S, B, HIDDEN, generator=generator, dtype=dtype).to(device)
    rows = torch.arange(S * B, device=device).view(S, B)

    def run(p: float, training: bool, step: int = 3, recompute: bool = False) -> list[Tensor]:
        masks = MaskSource(5, quantise(p))
        masks.set(step, rows)
        linear.attach(factors, masks, 9)
        linear.train(training)
        factors.zero_grad()
        leaf = x.clone().requires_grad_()
        y = checkpoint(linear, leaf, use_reentrant=False)[0] if recompute else linear(leaf)[0]
        y.backward(torch.ones_like(y))
        return [y.detach(), leaf.grad, factors.lora_A.grad.clone(), factors.lora_B.grad.clone()]

    def same(first: list[Tensor], second: list[Tensor]) -> bool:
        return all(same_bits(*pair) for pair in zip(first, second, strict=True))

    return {
        "eval is p = 0": same(run(0.5, training=False), run(0.0, training=True)),
        "training drops": not same(run(0.5, training=True), run(0.0, training=True)),
        "a step draws anew": not same(run(0.5, True, step=4), run(0.5, True)),
        "recompute is the same": same(run(0.5, True, recompute=True), run(0.5, True)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_drops_in_training_only(dtype: torch.dtype) -> None:
    (found,) = run_ranks(1, on_a_world_of_one, dtype)
    assert all(found.values()), found
