"""Adapters gathered from sharded models: plain PEFT on the plain base gives the sharded model's logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.tensors import module_paths
from lowrank_dist.formats.provenance import Provenance, fingerprint
from lowrank_dist.methods.lora.factors import adapter_factors
from lowrank_dist.methods.lora.files import AdapterFactors, write_adapter
from tests.dist.ranks import run_ranks
from tests.dist.tiny_runs import Setting, build, nonzero_factors
from tests.tiny_models import make_tiny

CASES = {
    "llama, all": ("llama", {}, ("all-linear",)),
    "one KV head for two ranks": ("qwen2", {"num_key_value_heads": 1}, ("all-linear",)),
    "gpt2, whole c_attn": ("gpt2", {}, ("all-linear",)),
    "gpt2, q and v inside c_attn": ("gpt2", {}, ("q_proj", "v_proj")),
    "gpt2, k alone": ("gpt2", {}, ("k_proj", "c_fc")),
    "opt": ("opt", {}, ("all-linear",)),
}


def token_ids() -> torch.Tensor:
    return torch.randint(5, 100, (2, 16), generator=torch.Generator().manual_seed(3))


def export(setting: Setting, out: str, rslora: bool) -> Any:
    """On one rank: draw random factors and return the sharded model's logits; rank 0 writes the gathered adapter."""
    from tests.dist.whole import gather_factors

    model, adapted, _, topology = build(setting)
    ids = token_ids()
    model.eval()
    logits = model.logits(ids, torch.arange(16).expand(2, 16))
    whole = gather_factors(adapted, topology.tp_group)
    if topology.tp_rank == 0:
        architecture, base = model.architecture, Path(setting.folder)
        adapter = AdapterFactors(adapter_factors(whole), 0.0, rslora, architecture.conv1d, str(base))
        provenance = Provenance(fingerprint(base), str(base), {})
        write_adapter(Path(out), adapter, provenance, module_paths(architecture), trained=True)
    return logits.numpy()


def peft_logits(base: Path, adapter: Path | None) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(token_ids()).logits.numpy()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_peft_reproduces_the_sharded_model(case: str, rslora: bool, tmp_path: Path) -> None:
    family, overrides, targets = CASES[case]
    base = make_tiny(family, tmp_path / "base", **overrides)
    setting = Setting(str(base), 2, True, zero_b=False, targets=targets, rslora=rslora)
    found = run_ranks(2, export, setting, str(tmp_path / "adapter"), rslora)[0]
    expected = peft_logits(base, tmp_path / "adapter")
    gap = np.abs(found - expected).max() / np.abs(expected).max()
    change = np.abs(peft_logits(base, None) - expected).max() / np.abs(expected).max()
    assert gap < 1e-5
    assert change > 100 * gap and change > 1e-2, "an adapter that changes nothing proves nothing"


def test_parts_of_different_scale_and_rank_become_one_factor(tmp_path: Path) -> None:
    """q (alpha 8, r = 4) and v (alpha 3, r = 2) become one c_attn factor of r = 6 that keeps both updates."""
    from lowrank_dist.arch.placement import LoraRules, place_factors
    from lowrank_dist.methods.lora.factors import WholeFactor

    base = make_tiny("gpt2", tmp_path / "base")
    rules = LoraRules(4, 8.0, ["q_proj", "v_proj"], False, {"v_proj": 2}, {"v_proj": 3.0})
    placements = place_factors(read_architecture(base), rules)
    values = nonzero_factors(placements)
    specs = {f.path: f for p in placements for f in p.factors}
    whole = {path: WholeFactor(specs[path], *values[path]) for path in values}
    factor = adapter_factors(whole)["transformer.h.0.attn.c_attn"]
    assert factor.rank == 6 and factor.b.shape == (192, 6)
    update = factor.scale(False) * factor.b @ factor.a
    expected = torch.zeros(192, 64)
    for name, row in (("q_proj", 0), ("v_proj", 128)):
        spec = specs[f"transformer.h.0.attn.{name}"]
        a, b = values[spec.path]
        expected[row : row + 64] = spec.scale * b @ a
    torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-7)
    assert not update[64:128].any()
    # Negative control: the same blocks under v's own scale give another update.
    wrong = replace(whole["transformer.h.0.attn.v_proj"].spec, scale=2.0)
    whole["transformer.h.0.attn.v_proj"] = WholeFactor(wrong, *values["transformer.h.0.attn.v_proj"])
    spoiled = adapter_factors(whole)["transformer.h.0.attn.c_attn"]
    assert not torch.allclose(spoiled.scale(False) * spoiled.b @ spoiled.a, expected, rtol=1e-3)
