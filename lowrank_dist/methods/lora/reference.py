"""Low-rank updates of transformers' own modules: PEFT's where it is installed and has these factors, else plain ones.

PEFT has one factor for a module. It cannot train a factor on a part of one (q_proj inside GPT-2's c_attn): of the
exported factor, which is zero outside the parts' blocks, it would train the zeros as well.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.cut import renumbered
from lowrank_dist.arch.placement import FactorSpec, place_factors
from lowrank_dist.methods.lora.config import LoraConfig
from lowrank_dist.methods.lora.factors import adapter_factors, whole_factors
from lowrank_dist.methods.lora.files import AdapterFactors, named_tensors
from lowrank_dist.methods.lora.footprint import placement_rules
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.reference import Reference, Start, call, call_with, detached, leaves, load_frozen


def adapted_layers(section: LoraConfig, architecture: Architecture) -> Sequence[int]:
    """See `reference.ReferenceBuilder`."""
    return sorted({placement.layer for placement in place_factors(architecture, placement_rules(section))})


def cut_section(section: LoraConfig, architecture: Architecture, layers: Sequence[int]) -> LoraConfig:
    """See `reference.ReferenceBuilder`. Every target is named by its whole path, so any pattern can be cut."""
    new = {old: number for number, old in enumerate(layers)}
    specs = {
        renumbered(spec.path, placement.layer, new[placement.layer]): spec
        for placement in place_factors(architecture, placement_rules(section))
        if placement.layer in new
        for spec in placement.factors
    }
    cut = {
        "targets": list(specs),
        "rank_pattern": {
            re.escape(path): spec.adapter_rank for path, spec in specs.items() if spec.adapter_rank != section.rank
        },
        "alpha_pattern": {re.escape(path): spec.alpha for path, spec in specs.items() if spec.alpha != section.alpha},
        "init_from": None,
    }
    return LoraConfig.model_validate({**section.model_dump(), **cut})


def build(section: LoraConfig, setting: Setting, start: Start, dtype: torch.dtype, device: torch.device) -> Reference:
    """See `reference.ReferenceBuilder`."""
    architecture = read_architecture(setting.base)
    placements = place_factors(architecture, placement_rules(section))
    specs = [spec for placement in placements for spec in placement.factors]
    if importlib.util.find_spec("peft") is not None and all(spec.rows == spec.export_rows for spec in specs):
        return _by_peft(architecture, setting, start, dtype, device)
    model, parameters = load_frozen(setting.base, dtype, device), leaves(start.values, device)
    for spec in specs:
        own = [parameters[f"{spec.path}.lora_{name}"] for name in ("A", "B")]
        magnitude = parameters.get(f"{spec.path}.lora_magnitude_vector")
        hook = partial(_update, spec, architecture.conv1d, own, magnitude)
        model.get_submodule(spec.export_path).register_forward_hook(hook)

    def exported() -> Mapping[str, Tensor]:
        factors = adapter_factors(whole_factors(placements, detached(parameters)))
        return named_tensors(AdapterFactors(factors, 0.0, section.rslora, architecture.conv1d, ""))

    return Reference(model, architecture, parameters, partial(call, model), exported)


def _by_peft(
    architecture: Architecture, setting: Setting, start: Start, dtype: torch.dtype, device: torch.device
) -> Reference:
    """Return PEFT's adapter, which starts from the exported folder: this checks the exporter too."""
    import peft

    model: Any = load_frozen(setting.base, dtype, device)
    adapter = peft.PeftModel.from_pretrained(
        model, str(start.folder), is_trainable=True, autocast_adapter_dtype=False, torch_device=str(device)
    ).eval()
    trained = {name: value for name, value in adapter.named_parameters() if value.requires_grad}
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default"): name
        for name in trained
    }
    assert theirs.keys() == start.values.keys(), "PEFT trains other tensors than the run"
    # PEFT's are in the model's type, and AdamW needs fp32.
    loaded = peft.utils.load_peft_weights(str(start.folder), device="cpu")
    files = {name: _exported_name(name) for name in start.values}
    parameters = leaves({name: loaded[files[name]] for name in start.values}, device)
    adapter.requires_grad_(False)
    weights = {theirs[name]: leaf for name, leaf in parameters.items()}

    def exported() -> dict[str, Tensor]:
        return {files[name]: value for name, value in detached(parameters).items()}

    compute = partial(call_with, adapter, weights)
    return Reference(model, architecture, parameters, compute, exported, f"PEFT {peft.__version__}")


def _exported_name(stored: str) -> str:
    end = "" if stored.endswith(".lora_magnitude_vector") else ".weight"
    return f"base_model.model.{stored}{end}"


def _update(
    spec: FactorSpec,
    transposed: bool,
    factors: Sequence[Tensor],
    magnitude: Tensor | None,
    module: Any,
    inputs: tuple[Tensor],
    output: Tensor,
) -> Tensor:
    """Return the output [T, out] of a linear with s·B·A, and with DoRA's magnitudes, on the rows of the factor."""
    rows = slice(spec.export_row, spec.export_row + spec.rows)
    a, b = (factor.to(output.dtype) for factor in factors)
    own = output[..., rows] + spec.scale * (inputs[0] @ a.T @ b.T)
    if magnitude is not None:
        weight = (module.weight.T if transposed else module.weight)[rows].float()
        # The norm is a constant to autograd, as in the paper (section 4.3) and in PEFT.
        norm = (weight + spec.scale * factors[1] @ factors[0]).detach().norm(dim=1)
        bias = 0 if module.bias is None else module.bias[rows]
        own = (magnitude / norm).to(output.dtype) * (own - bias) + bias
    return torch.cat((output[..., : rows.start], own, output[..., rows.stop :]), dim=-1)
