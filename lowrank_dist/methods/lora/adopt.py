"""Adoption of a PEFT adapter: the placement rules of its factors, and the factors, checked against the base."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.placement import ALL_LINEAR, LinearPlacement, LoraRules
from lowrank_dist.arch.tensors import module_paths
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.formats.paths import detect_removal
from lowrank_dist.formats.provenance import refuse_another_base
from lowrank_dist.methods.files import CONFIG_FILE, WEIGHTS_FILE
from lowrank_dist.methods.lora.config import LoraConfig
from lowrank_dist.methods.lora.extras import require_copies
from lowrank_dist.methods.lora.files import AdapterFactors, LowRankFactor, read_adapter
from lowrank_dist.methods.lora.peft_config import describe


def adopt_adapter(section: LoraConfig, base: Path) -> LoraConfig:
    """Return the section with the values of the adapter in init_from; unchanged where init_from is null.

    Rank, alpha, targets, patterns, rslora and dora are taken from the adapter, so that `place_factors` gives exactly
    its factors; dropout stays the section's. Raises UserError where the config gives one of these keys another value,
    for factors on modules that the model in `base` cannot adapt, and for a rank or alpha outside the section's limits.
    """
    folder = section.init_from
    if folder is None:
        return section
    architecture = read_architecture(base)
    with detect_removal(folder) as found:
        adapter = read_adapter(found, architecture)
        require_copies(found, base)
    refuse_foreign(folder, adapter, architecture.linear_modules(), base)
    adopted = {**asdict(rules_of(adapter, architecture)), "dora": adapter.dora}
    _refuse_contradictions(section, adopted, adapter, architecture)
    try:
        return LoraConfig.model_validate({**section.model_dump(), **adopted})
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, detail['loc']))} is {detail['input']!r}: {detail['msg']}"
            for detail in error.errors(include_url=False)
        )
        raise UserError(
            f"{folder / CONFIG_FILE}: a run cannot start from this adapter ({wrong}); set lora.init_from to another one"
        ) from None


def initial_factors(folder: Path, placements: Sequence[LinearPlacement], base: Path) -> dict[str, LowRankFactor]:
    """Return module path → factor of the adapter in `folder` (lora.init_from), from which training starts.

    Raises UserError for an adapter that was trained on another base, by its fingerprint, or whose modules or shapes
    differ from `placements`.
    """
    with detect_removal(folder) as found:
        refuse_another_base(found, base)
        return factors_for(found, read_adapter(found), placements, base)


def _refuse_contradictions(
    lora: LoraConfig, adopted: Mapping[str, Any], adapter: AdapterFactors, architecture: Architecture
) -> None:
    other = []
    for key, value in adopted.items():
        given = getattr(lora, key)
        same = given == value
        if key == "targets":
            same = (
                adapter.factors.keys() == architecture.linear_modules()
                if given == ALL_LINEAR
                else isinstance(given, list) and sorted(given) == value
            )
        if key in lora.model_fields_set and not same:
            other.append(f"lora.{key} is {given!r} in the config and {value!r} in the adapter")
    if other:
        raise UserError(
            f"lora.init_from: the config contradicts the adapter {lora.init_from}: {'; '.join(other)}. Remove these "
            "keys from the config"
        )


def rules_of(adapter: AdapterFactors, architecture: Architecture) -> LoraRules:
    """Return rules for which `place_factors` gives the adapter's factors, provided all are on linears of the model."""
    peft = describe(
        {module: (factor.rank, factor.alpha) for module, factor in adapter.factors.items()},
        module_paths(architecture),
        dropout=adapter.dropout,
        rslora=adapter.rslora,
        dora=adapter.dora,
        fan_in_fan_out=adapter.fan_in_fan_out,
        base=adapter.base,
    )
    return LoraRules(
        peft.rank, peft.alpha, list(peft.targets), peft.rslora, dict(peft.rank_pattern), dict(peft.alpha_pattern)
    )


def refuse_foreign(folder: Path, adapter: AdapterFactors, known: Collection[str], base: Path) -> None:
    """Raise UserError for factors on modules outside `known`."""
    foreign = sorted(adapter.factors.keys() - set(known))
    if foreign:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: {some_of(foreign)} cannot be adapted in the model in {base}; give an adapter "
            "of this model's attention and MLP linears"
        )


def factors_for(
    folder: Path, adapter: AdapterFactors, placements: Sequence[LinearPlacement], base: Path
) -> dict[str, LowRankFactor]:
    """Return the adapter's factors by module path.

    Raises UserError where the adapter's modules or shapes differ from `placements`.
    """
    specs = {spec.path: spec for placement in placements for spec in placement.factors}
    refuse_foreign(folder, adapter, specs, base)
    lacking = sorted(specs.keys() - adapter.factors.keys())
    if lacking:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: no factors for {some_of(lacking)}, which lora.targets names; give a complete "
            "adapter"
        )
    for path, spec in specs.items():
        found = adapter.factors[path]
        expected = (spec.adapter_rank, spec.in_features), (spec.rows, spec.adapter_rank)
        if (tuple(found.a.shape), tuple(found.b.shape)) != expected:
            raise UserError(
                f"{folder / WEIGHTS_FILE}: {path} has lora_A {list(found.a.shape)} and lora_B {list(found.b.shape)}, "
                f"but the model in {base} takes {list(expected[0])} and {list(expected[1])}; give the model that the "
                "adapter was trained on"
            )
    return {path: adapter.factors[path] for path in specs}
