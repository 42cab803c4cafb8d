"""Gradients in bf16: those of the factors err at most twice as much as plain autograd's through transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.placement import LoraRules, place_factors
from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.dist.tiny_runs import Setting, forward_backward, max_relative_error, nonzero_factors, samples
from tests.tiny_models import FAMILY_NAMES, make_tiny

LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2_sp": (2, True)}
TOLERANCE = 5e-5  # of the peer in fp32
# Shorter than the longest samples, so that gradients pass through windows too.
WINDOW = {family: {"sliding_window": 12} for family in ("mistral", "olmo3", "gemma3_text")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both layers of a tiny model differ where the family has kinds of layers."""
    base = tmp_path_factory.mktemp("bf16_gradients")
    made = {name: make_tiny(name, base / name, dtype=torch.bfloat16, **WINDOW.get(name, {})) for name in FAMILY_NAMES}
    return {name: str(folder) for name, folder in made.items()}


def by_autograd(folder: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what forward_backward does, of transformers' model with a product of two factors beside each linear."""
    architecture = read_architecture(Path(folder))
    placements = place_factors(architecture, rules(architecture.gated))
    specs = {spec.path: spec for placement in placements for spec in placement.factors}
    device = torch.device("cpu") if dtype == torch.float32 else ranks.device()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype).eval().to(device)
    model.requires_grad_(False)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for path, pair in nonzero_factors(placements).items():
        a, b = factors[path] = (pair[0].to(device).requires_grad_(), pair[1].to(device).requires_grad_())
        model.get_submodule(path).register_forward_hook(_adding(a, b, 8.0 / specs[path].adapter_rank))
    count = sum(int(target[1:].sum()) for _, target in samples())
    for tokens, target in samples():
        logits = model(tokens[None].to(device), use_cache=False).logits[0, :-1][target[1:].to(device)]
        (F.cross_entropy(logits.float(), tokens[1:][target[1:]].to(device), reduction="sum") / count).backward()
    return {
        f"{path}.{side}": factor.grad.cpu().numpy()
        for path, pair in factors.items()
        for side, factor in zip("ab", pair, strict=True)
        if factor.grad is not None
    }


def rules(gated: bool) -> LoraRules:
    """Return the rules of tiny_runs.build."""
    return LoraRules(4, 8.0, "all-linear", False, {"down_proj": 6} if gated else {}, {})


def _adding(a: Tensor, b: Tensor, scale: float) -> Any:
    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        return output + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    return add


def all_gradients(folders: dict[str, str], setting: Setting) -> dict[str, dict[str, Any]]:
    """On one rank: return the gradients of every folder's factors."""
    found = {name: forward_backward(replace(setting, folder=folder)) for name, folder in folders.items()}
    return {name: {k: v for k, v in values.items() if k[-2:] in (".a", ".b")} for name, values in found.items()}


def worst_factor(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest |found - expected| / |expected| of a factor's gradient, in Euclidean norms.

    Not the largest element: where rounding moves an input of OPT's ReLU over 0, one row of fc1's gradient is far off,
    in plain autograd as here.
    """
    assert found.keys() == expected.keys()
    return float(max(np.linalg.norm(found[key] - expected[key]) / np.linalg.norm(expected[key]) for key in expected))


@pytest.fixture(scope="module")
def exact(folders: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {name: by_autograd(folder, torch.float32) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def allowed(folders: dict[str, str], exact: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Twice the error of plain autograd in bf16, by family."""
    plain = {name: by_autograd(folder, torch.bfloat16) for name, folder in folders.items()}
    return {name: 2 * worst_factor(plain[name], exact[name]) for name in folders}


def test_the_peer_computes_the_same(folders: dict[str, str], exact: dict[str, dict[str, Any]]) -> None:
    (found,) = run_ranks(1, all_gradients, folders, Setting("", zero_b=False))
    for name in folders:
        assert max_relative_error(found[name], exact[name]) < TOLERANCE, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_errs_as_autograd_does(
    folders: dict[str, str], exact: dict[str, dict[str, Any]], allowed: dict[str, float], layout: str
) -> None:
    tensor, sequence = LAYOUTS[layout]
    found = run_ranks(tensor, all_gradients, folders, Setting("", tensor, sequence, zero_b=False, dtype="bf16"))[0]
    errors = {name: worst_factor(found[name], exact[name]) for name in folders}
    assert {name: error for name, error in errors.items() if not 0 < error <= allowed[name]} == {}


def test_notices_a_dropped_deferred_sum(
    folders: dict[str, str], exact: dict[str, dict[str, Any]], allowed: dict[str, float]
) -> None:
    """Negative control."""
    broken = Setting("", 2, True, zero_b=False, dtype="bf16", broken="deferred")
    found = run_ranks(2, all_gradients, folders, broken)[0]
    for name in folders:
        assert worst_factor(found[name], exact[name]) > allowed[name], name
