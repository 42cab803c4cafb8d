"""PEFT → ours → PEFT: a sharded run starts from an adapter trained by plain PEFT, and PEFT loads the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lowrank_dist.arch.families import FAMILIES
from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.dist.tiny_runs import MAX_LENGTH, Setting, microbatches
from tests.tiny_models import FAMILY_NAMES, make_tiny

STEPS = 2
# Linears of a family → the first family with them. The names in an adapter's files follow from the linears, and logits
# and gradients are compared for every family in other tests, so a family with those of another one is nightly.
FIRST_WITH = {str(FAMILIES[name].linears): name for name in reversed(FAMILY_NAMES) if name in FAMILIES}
BY_LINEARS = [
    pytest.param(name, marks=() if name in FIRST_WITH.values() else pytest.mark.nightly) for name in FAMILY_NAMES
]


def token_ids() -> torch.Tensor:
    return torch.randint(5, 100, (2, 16), generator=torch.Generator().manual_seed(3))


def trained_by_peft(base: Path, out: Path, family: str) -> np.ndarray:
    """Train two steps in plain PEFT from its own random factors, B ≠ 0; return the logits afterwards."""
    torch.manual_seed(5)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(out)
    with torch.no_grad():
        return model.eval()(token_ids()).logits.numpy()


def peft_logits(base: Path, adapter: Path) -> np.ndarray:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        return model.eval()(token_ids()).logits.numpy()


def continued(folder: str, start: str, out: str, spoiled: bool) -> tuple[np.ndarray, np.ndarray]:
    """On one rank: return the sharded model's logits at the start and after two steps; rank 0 writes its adapter."""
    from lowrank_dist.arch.placement import LoraRules, place_factors
    from lowrank_dist.arch.tensors import module_paths
    from lowrank_dist.config import Config
    from lowrank_dist.engine.resumable import complete
    from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
    from lowrank_dist.formats.provenance import Provenance, fingerprint
    from lowrank_dist.methods.lora.adopt import initial_factors
    from lowrank_dist.methods.lora.factors import adapter_factors, inject
    from lowrank_dist.methods.lora.files import AdapterFactors, write_adapter
    from lowrank_dist.model.load import check_model, load_model
    from lowrank_dist.ops.mask import quantise
    from lowrank_dist.parallel.masks import MaskSource
    from tests.dist.whole import gather_factors, spread_factors

    sections = {"model": {"path": folder}, "lora": {"init_from": start}, "data": {"train": "-"}, "output": {"dir": "-"}}
    config = complete(Config.model_validate(sections), None)
    lora = config.lora
    topology = ranks.topology(2, True)
    model = load_model(
        Path(folder),
        check_model(Path(folder), topology.tp_size, MAX_LENGTH),
        topology,
        device=ranks.device(),
        dtype="fp32",
        vocab_multiple=4,
        broadcast=False,
    )
    rules = LoraRules(lora.rank, lora.alpha, lora.targets, lora.rslora, lora.rank_pattern, lora.alpha_pattern)
    placements = place_factors(model.architecture, rules)
    masks = MaskSource(11, quantise(0.0))
    adapted = inject(model, placements, masks, 3, topology.tp_rank, topology.tp_size)
    read = initial_factors(lora.init_from, placements, Path(folder))
    values = {path: (factor.a, factor.b) for path, factor in read.items()}
    if spoiled:
        q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
        values[k] = (values[q][0], values[k][1])
    spread_factors(adapted, topology, values)
    first = _logits(model)
    parameters = [p for linear in adapted for p in linear.factors.parameters()]
    optimiser = ZeroOptimiser(parameters, topology, OptimiserRules(1, 0.5, None, 0.01, (0.9, 0.999), 1e-3))
    batches, targets = microbatches(Setting(folder, 2), topology.dp_rank, topology.dp_size, topology.tp_size)
    model.train()
    for step in range(STEPS):
        for index, batch in enumerate(batches):
            masks.set(step, batch.dropout_rows)
            arguments = batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.segments
            optimiser.accumulate(lambda given=arguments: model.loss(*given), 1 / targets, index + 1 == len(batches))
        optimiser.step(1e-2)
    whole = gather_factors(adapted, topology.tp_group)
    if topology.tp_rank == 0:
        architecture, base = model.architecture, Path(folder)
        adapter = AdapterFactors(adapter_factors(whole), lora.dropout, lora.rslora, architecture.conv1d, folder)
        provenance = Provenance(fingerprint(base), folder, config.model_dump(mode="json"))
        write_adapter(Path(out), adapter, provenance, module_paths(architecture), trained=True)
    return first, _logits(model)


def _logits(model: Any) -> np.ndarray:
    model.eval()
    positions = torch.arange(16, device=ranks.device()).expand(2, 16)
    with torch.no_grad():
        return model.logits(token_ids().to(ranks.device()), positions).cpu().numpy()


def gap(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", BY_LINEARS)
def test_peft_to_ours_to_peft(family: str, tmp_path: Path) -> None:
    base, start, out = make_tiny(family, tmp_path / "base"), tmp_path / "start", tmp_path / "out"
    expected = trained_by_peft(base, start, family)
    first, last = run_ranks(2, continued, str(base), str(start), str(out), False)[0]
    assert gap(first, expected) < 1e-5
    assert gap(last, first) > 1e-3, "training that changes nothing proves nothing"
    assert gap(peft_logits(base, out), last) < 1e-5


def test_notices_another_a(tmp_path: Path) -> None:
    """Negative control: with q's A in place of k's the logits differ."""
    base, start = make_tiny("llama", tmp_path / "base"), tmp_path / "start"
    expected = trained_by_peft(base, start, "llama")
    assert gap(run_ranks(2, continued, str(base), str(start), str(tmp_path / "out"), True)[0][0], expected) > 1e-3
