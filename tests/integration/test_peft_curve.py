"""Twenty steps against PEFT: same base, same A, same data, same optimiser, dropout 0 → the same loss curve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.placement import LoraRules, place_factors
from lowrank_dist.methods.lora.factors import initial_a
from tests.dist.ranks import run_ranks
from tests.dist.tiny_runs import Setting, samples, train
from tests.tiny_models import make_tiny

STEPS = 20
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def peft_losses(folder: Path, targets: list[str], a_factor: float = 1.0) -> np.ndarray:
    """Run the same training in a plain PyTorch loop; `a_factor` scales the initial A for the negative control."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ranks = {"down_proj": 6} if "down_proj" in targets else {}
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, rank_pattern=ranks, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    rules = LoraRules(4, 8.0, targets, False, ranks, {})
    for placement in place_factors(read_architecture(folder), rules):
        for spec in placement.factors:
            module = model.get_submodule(f"base_model.model.{spec.path}")
            module.lora_A["default"].weight.data.copy_(initial_a(spec, 3) * a_factor)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.01)
    data = samples()
    length = max(len(tokens) for tokens, _ in data)
    ids = torch.zeros(len(data), length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (tokens, target) in enumerate(data):
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(target, tokens, -100)
    losses = []
    for _ in range(STEPS):
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimiser.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize("family", TARGETS)
def test_same_loss_curve_as_peft(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path / family)
    expected = peft_losses(folder, TARGETS[family])
    assert expected[-1] < 0.7 * expected[0], "a curve that does not fall proves nothing"
    targets = tuple(TARGETS[family]) if family == "gpt2" else ("all-linear",)
    for world, tensor in ((1, 1), (2, 2)):
        found = run_ranks(world, train, Setting(str(folder), tensor, targets=targets, steps=STEPS))[0]["losses"]
        assert np.abs(np.array(found) - expected).max() < 1e-4


def test_notices_another_start(tmp_path: Path) -> None:
    """Negative control: with A a tenth larger the curves differ."""
    folder = make_tiny("llama", tmp_path / "llama")
    found = run_ranks(1, train, Setting(str(folder), steps=STEPS))[0]["losses"]
    assert np.abs(np.array(found) - peft_losses(folder, TARGETS["llama"], 1.1)).max() > 1e-3
