"""Loss and gradients do not depend on how a batch is split, padded, packed or recomputed; Φ₀ has no training state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.dist.test_twins import TOLERANCE
from tests.dist.tiny_runs import Setting, build, forward_backward, max_relative_error, microbatches, train
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = make_tiny("llama", tmp_path_factory.mktemp("batches") / "llama")
    return Setting(str(folder), dropout=0.1, zero_b=False)


CUTS = {
    "one at a time": {"micro_batch": 1},
    "two at a time": {"micro_batch": 2},
    "longer rows": {"pad_to": 48},
    "odd rows": {"pad_to": 41},
    "more vocabulary rows": {"vocab_multiple": 64},
    "packed": {"packing": True},
    "packed, one row at a time": {"packing": True, "micro_batch": 1},
    "recomputed": {"recompute": True},
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_cut_does_not_matter(base: Setting, cut: str) -> None:
    expected = run_ranks(1, forward_backward, base)[0]
    assert max_relative_error(run_ranks(1, forward_backward, replace(base, **CUTS[cut]))[0], expected) < TOLERANCE
    twin = replace(base, tensor=2, **{**CUTS[cut], **({"pad_to": 42} if cut == "odd rows" else {})})
    assert max_relative_error(run_ranks(2, forward_backward, twin)[0], expected) < TOLERANCE


@pytest.mark.parametrize("cut", ["one at a time", "packed, one row at a time", "recomputed"])
def test_the_cut_does_not_matter_to_three_steps(base: Setting, cut: str) -> None:
    expected = run_ranks(1, train, base)[0]
    assert max_relative_error(run_ranks(2, train, replace(base, tensor=2, **CUTS[cut]))[0], expected) < TOLERANCE


def mean_of_means(setting: Setting) -> float:
    """Return the loss of trainers that average each microbatch, which is wrong whenever lengths differ."""
    model, _, masks, _ = build(setting)
    batches, _ = microbatches(setting, 0, 1, 1)
    means = []
    for b in batches:
        masks.set(0, b.dropout_rows)
        loss = model.loss(b.input_ids, b.position_ids, b.target_index, b.target_ids, b.segments)
        means.append(loss.item() / b.target_ids.numel())
    return sum(means) / len(means)


def test_notices_a_mean_of_means(base: Setting) -> None:
    """Negative control: normalising by microbatch gives visibly different numbers."""
    expected = run_ranks(1, forward_backward, base)[0]["loss"]
    assert abs(run_ranks(1, mean_of_means, replace(base, micro_batch=1))[0] - expected) > 1e-3 * expected


def packed_without_segments(setting: Setting) -> float:
    model, _, masks, _ = build(setting)
    batches, targets = microbatches(setting, 0, 1, 1)
    total = 0.0
    for b in batches:
        masks.set(0, b.dropout_rows)
        everything = tuple((row, 0, b.input_ids.size(1)) for row in range(b.input_ids.size(0)))
        total += model.loss(b.input_ids, b.position_ids, b.target_index, b.target_ids, everything).item()
    return total / targets


def test_notices_attention_across_samples(base: Setting) -> None:
    """Negative control: packed rows in which a sample attends to the one before it."""
    expected = run_ranks(1, forward_backward, base)[0]["loss"]
    assert abs(run_ranks(1, packed_without_segments, replace(base, packing=True))[0] - expected) > 1e-3 * expected


def no_targets(setting: Setting) -> tuple[float, float]:
    model, adapted, masks, _ = build(setting)
    (b,), _ = microbatches(setting, 0, 1, 2)
    masks.set(0, b.dropout_rows)
    none = torch.zeros(0, dtype=torch.int64, device=ranks.device())
    loss = model.loss(b.input_ids, b.position_ids, none, none, b.segments)
    loss.backward()
    return loss.item(), sum(float(p.grad.abs().sum()) for linear in adapted for p in linear.factors.parameters())


def test_a_microbatch_without_targets_is_zero_and_does_not_hang(base: Setting) -> None:
    for sequence in (True, False):
        assert run_ranks(2, no_targets, replace(base, tensor=2, sequence=sequence)) == [(0.0, 0.0)] * 2


def bytes_of_training(setting: Setting, unfreeze: bool = False) -> dict[str, Any]:
    """Return the bytes that a training step leaves beside Φ₀ and Θ, counted from the optimiser and the parameters."""
    from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser

    model, adapted, masks, topology = build(setting)
    theta = [p for linear in adapted for p in linear.factors.parameters()]
    trained = set(map(id, theta))
    frozen = [p for p in model.parameters() if id(p) not in trained]
    if unfreeze:
        model.decoder.final_layernorm.weight.requires_grad_()
    optimiser = ZeroOptimiser(theta, topology, OptimiserRules(1, 1.0, None, 0.0, (0.9, 0.999), 1e-8))
    batches, targets = microbatches(setting, topology.dp_rank, topology.dp_size, topology.tp_size)
    for index, b in enumerate(batches):
        masks.set(0, b.dropout_rows)
        optimiser.accumulate(
            lambda b=b: model.loss(b.input_ids, b.position_ids, b.target_index, b.target_ids, b.segments),
            1 / targets,
            index + 1 == len(batches),
        )
    optimiser.step(1e-3)
    zero = optimiser.engine.optimizer
    state = zero.optimizer.state
    return {
        "theta": sum(p.numel() for p in theta),
        "frozen": sum(p.numel() for p in frozen),
        "frozen_gradients": sum(p.grad.numel() for p in frozen if p.grad is not None),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seen_by_deepspeed": sum(p.numel() for p in optimiser.engine.module.parameters()),
        "masters": sum(p.numel() for p in zero.single_partition_of_fp32_groups),
        "moments": sum(t.numel() for s in state.values() for t in s.values() if torch.is_tensor(t) and t.ndim),
        "bucket": zero.reduce_bucket_size,
    }


def test_the_frozen_base_has_no_gradient_master_state_or_bucket(base: Setting) -> None:
    """On each rank all training state is |Θ|-sized, and over two data-parallel ranks the optimiser state is halved."""
    for world, tensor in ((1, 1), (2, 2), (4, 2)):
        for seen in run_ranks(world, bytes_of_training, replace(base, tensor=tensor)):
            dp = world // tensor
            assert seen["frozen"] > 5 * seen["theta"]
            assert seen["frozen_gradients"] == 0
            assert seen["trainable"] == seen["theta"] == seen["seen_by_deepspeed"] == seen["bucket"]
            # ZeRO rounds each of its two flat groups up to its alignment.
            slack = 64 * dp
            assert seen["theta"] // dp <= seen["masters"] <= seen["theta"] // dp + slack
            assert 2 * (seen["theta"] // dp) <= seen["moments"] <= 2 * (seen["theta"] // dp + slack)


def test_notices_a_trainable_base_parameter(base: Setting) -> None:
    """Negative control of the count: one base parameter left trainable shows as a gradient."""
    seen = run_ranks(1, bytes_of_training, base, True)[0]
    assert seen["frozen_gradients"] > 0 and seen["trainable"] > seen["theta"]
