"""DoRA's norms: recomputed by whatever changes factors, with one reduction for the whole model and none in a layer.

test_methods.py tests that DoRA trains as PEFT's does and alike at every layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import ranks
from tests.dist.method_runs import MethodSetting, _batches, _loss, build
from tests.dist.ranks import run_ranks
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("dora") / "llama"))


def updates(model: torch.nn.Module) -> list[Any]:
    from lowrank_dist.parallel.decomposed import DecomposedFactors

    return [module for module in model.modules() if isinstance(module, DecomposedFactors)]


def poison(model: torch.nn.Module) -> None:
    for update in updates(model):
        update.norm.fill_(torch.nan)
        update.gain.fill_(torch.nan)


def losses_around_a_step(
    folder: str, poisoned: bool, refreshing: bool
) -> tuple[float, float, dict[tuple[str, str], int]]:
    """On one rank: return the loss before and after a step of the engine, and the collectives of the step."""
    from lowrank_dist.engine.zero import Engine, OptimiserRules, ZeroOptimiser
    from lowrank_dist.parallel.counting import count_collectives

    setting = MethodSetting(folder, 2, True, name="dora")
    built = build(setting)
    built.model.eval()
    optimiser = ZeroOptimiser(
        built.theta.parameters, built.topology, OptimiserRules(1, 0.5, None, 0.0, (0.9, 0.999), 1e-3)
    )
    engine = Engine(built.model, built.theta, optimiser, ranks.device())
    (batch, *_), targets = _batches(built, setting)
    before = optimiser.accumulate(lambda: _loss(built, batch), 1 / targets, True).item()
    if poisoned:
        poison(built.model)
    with count_collectives() as counted:
        (engine if refreshing else optimiser).step(1e-2)
    return before, _loss(built, batch).item(), counted.calls_by_kind()


def test_a_step_computes_the_norms(folder: str) -> None:
    before, clean, _ = run_ranks(2, losses_around_a_step, folder, False, True)[0]
    _, poisoned, _ = run_ranks(2, losses_around_a_step, folder, True, True)[0]
    assert poisoned == clean != before
    # The controls: norms are not recomputed, with and without poisoned values.
    assert torch.tensor(run_ranks(2, losses_around_a_step, folder, True, False)[0][1]).isnan()
    assert run_ranks(2, losses_around_a_step, folder, False, False)[0][1] != clean


def test_all_norms_are_one_reduction(folder: str) -> None:
    with_norms, without = (run_ranks(2, losses_around_a_step, folder, False, on)[0][2] for on in (True, False))
    assert {kind: with_norms[kind] - without[kind] for kind in with_norms} == {
        kind: int(kind == "all-reduce") for kind in with_norms
    }


def starts(folder: str, adapter: str) -> dict[str, float]:
    """On one rank: return the loss at the start from an adapter, with norms computed and with stale norms."""
    from unittest import mock

    from lowrank_dist.config import Config
    from lowrank_dist.engine.resumable import complete
    from lowrank_dist.engine.run_method import build_method
    from lowrank_dist.methods.lora import method as lora_method

    found = {}
    for name, kept in (("init_from", True), ("stale", False)):
        setting = MethodSetting(folder, 2, True, name="dora")
        built = build(setting)
        batches, _ = _batches(built, setting)
        sections = {
            "model": {"path": folder},
            "lora": {"init_from": adapter},
            "data": {"train": "-", "max_length": 48},
            "output": {"dir": "-"},
        }
        config = complete(Config.model_validate(sections), None)
        assert config.lora.dora
        refresh = lora_method.refresh_norms if kept else lambda *_: None
        with mock.patch.object(lora_method, "refresh_norms", refresh):
            built.theta = build_method(config, built.model.architecture).attach(
                built.model, built.topology, resumed=False
            )
        found[name] = _loss(built, batches[0]).item()
    return found


def test_an_adapter_to_start_from_brings_its_norms(folder: str, tmp_path: Path) -> None:
    """The loss is checked against PEFT; the control is a start whose norms are those of untrained factors."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.dist.tiny_runs import samples
    from tests.tiny_adapters import random_adapter, save_adapter

    def size(module: str) -> tuple[int, float] | None:
        return None if module == "lm_head" else (3, 6.0)

    adapter = save_adapter(tmp_path / "adapter", Path(folder), random_adapter(Path(folder), size, dora=True))
    found = run_ranks(2, starts, folder, str(adapter))[0]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter).eval()
    expected = 0.0
    with torch.no_grad():
        for tokens, target in samples():
            logits = model(tokens[None]).logits[0, :-1][target[1:]]
            expected += torch.nn.functional.cross_entropy(logits, tokens[1:][target[1:]], reduction="sum").item()
    assert abs(found["init_from"] / expected - 1) < 1e-5
    assert abs(found["stale"] / expected - 1) > 1e-3
