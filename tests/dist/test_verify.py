"""The run's side of `lowrank-dist verify`: the gradient that the optimiser is given, whole and by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.dist.ranks import run_ranks
from tests.dist.tiny_runs import Setting, build, forward_backward, microbatches
from tests.tiny_models import make_tiny

TOLERANCE = 5e-5


def gradients_of_the_optimiser(setting: Setting) -> dict[str, Any]:
    """On one rank: return name → whole gradient of the first step, as `verify` gathers it; empty on other ranks."""
    from lowrank_dist.engine.gathering import Gathering
    from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
    from lowrank_dist.methods.lora.factors import lora_theta

    model, adapted, masks, topology = build(setting)
    theta, seen = lora_theta(adapted, topology.tp_size, masks), []

    def enter(phase: str) -> None:
        if phase == "optimiser":
            seen.append(optimiser.gradients())

    rules = OptimiserRules(setting.zero_stage, 0.5, None, 0.01, (0.9, 0.999), 1e-3)
    optimiser = ZeroOptimiser(theta.parameters, topology, rules, enter)
    gathering = Gathering(theta, optimiser, topology)
    pad = topology.tp_size if topology.sequence_parallel else 1
    batches, targets = microbatches(setting, topology.dp_rank, topology.dp_size, pad)
    for index, batch in enumerate(batches):
        masks.set(0, batch.dropout_rows)
        arguments = batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.segments
        last = index + 1 == len(batches)
        optimiser.accumulate(lambda given=arguments: model.loss(*given), 1 / targets, last)
    optimiser.step(1e-2)
    snapshot = torch.stack([seen[0]] * 3)
    return {
        name: tensor[0].numpy()
        for whole in gathering.stream(snapshot, require_equal=setting.broken != "deferred")
        for name, tensor in whole.items()
    }


def test_the_gradient_of_a_step_by_name(tmp_path: Path) -> None:
    """Also where the step has several microbatches, at both stages of ZeRO."""
    folder = str(make_tiny("llama", tmp_path / "llama"))
    plain = run_ranks(1, forward_backward, Setting(folder, zero_b=False))[0]
    expected = {
        f"{name.removesuffix('.a').removesuffix('.b')}.lora_{name[-1].upper()}": value
        for name, value in plain.items()
        if name.endswith((".a", ".b"))
    }
    for stage in (1, 2):
        found = run_ranks(
            1, gradients_of_the_optimiser, Setting(folder, zero_b=False, micro_batch=2, zero_stage=stage)
        )[0]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.abs(found[name] - value).max() < TOLERANCE * np.abs(value).max(), name
