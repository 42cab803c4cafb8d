"""Where Θ starts: from a PEFT LoRA adapter (lora.init_from) in place of fresh factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from lowrank_dist.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, module_paths, read_adapter
from lowrank_dist.checkpoint.fingerprint import fingerprint
from lowrank_dist.checkpoint.peft_config import describe
from lowrank_dist.checkpoint.provenance import PROVENANCE_FILE, read_provenance
from lowrank_dist.config import Config
from lowrank_dist.config.schema import LoraConfig
from lowrank_dist.errors import UserError
from lowrank_dist.lora.placement import ALL_LINEAR, LinearPlacement
from lowrank_dist.messages import some_of
from lowrank_dist.model.architecture import Architecture
from lowrank_dist.model.huggingface import load_architecture


def adopt_adapter(config: Config) -> Config:
    """The config whose lora section says what the adapter in lora.init_from is; `config` itself without one.

    Rank, alpha, targets, patterns and rslora become the adapter's, so that `place` gives exactly its factors; dropout
    stays the config's. Raises UserError for a key of them that was given another value, for factors on modules that the
    model cannot adapt, and for a rank or an alpha that a run cannot have.
    """
    folder = config.lora.init_from
    if folder is None:
        return config
    adapter, architecture = read_adapter(folder), load_architecture(config.model.path)
    _refuse_foreign(folder, adapter.factors, architecture.linear_modules(), config.model.path)
    adopted = _lora_of(adapter, architecture)
    _refuse_contradictions(config.lora, adopted, adapter, architecture)
    try:
        lora = LoraConfig.model_validate({**config.lora.model_dump(), **adopted})
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, detail['loc']))} is {detail['input']!r}: {detail['msg']}"
            for detail in error.errors(include_url=False)
        )
        raise UserError(
            f"{folder / CONFIG_FILE}: a run cannot start from this adapter ({wrong}): give lora.init_from another one"
        ) from None
    return config.model_copy(update={"lora": lora})


def initial_factors(config: Config, placements: Sequence[LinearPlacement]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path → A [r, in] and B [out, r] in fp32, as `spread_factors` takes them; config: `adopt_adapter`'s.

    Raises UserError for an adapter that was trained on another base, by its fingerprint, or that has other modules or
    shapes than `placements`.
    """
    folder = config.lora.init_from
    assert folder is not None, "there is no adapter to start from"
    _refuse_another_base(folder, config.model.path)
    factors = read_adapter(folder).factors
    specs = {spec.path: spec for placement in placements for spec in placement.factors}
    _refuse_foreign(folder, factors, specs, config.model.path)
    lacking = sorted(specs.keys() - factors.keys())
    if lacking:
        raise UserError(f"{folder / WEIGHTS_FILE}: no factors for {some_of(lacking)}, which lora.targets names")
    for path, spec in specs.items():
        found = factors[path]
        expected = (spec.rank, spec.in_features), (spec.rows, spec.rank)
        if (tuple(found.a.shape), tuple(found.b.shape)) != expected:
            raise UserError(
                f"{folder / WEIGHTS_FILE}: {path} has lora_A {list(found.a.shape)} and lora_B {list(found.b.shape)}, "
                f"but the model in {config.model.path} takes {list(expected[0])} and {list(expected[1])}: give the "
                "model that the adapter was trained on as model.path"
            )
    return {path: (factors[path].a, factors[path].b) for path in specs}


def _lora_of(adapter: Adapter, architecture: Architecture) -> dict[str, Any]:
    """The keys of lora that say what the adapter is."""
    peft = describe(
        {module: (factor.rank, factor.alpha) for module, factor in adapter.factors.items()},
        module_paths(architecture),
        dropout=adapter.dropout,
        rslora=adapter.rslora,
        fan_in_fan_out=adapter.fan_in_fan_out,
        base=adapter.base,
    )
    return {
        "rank": peft.rank,
        "alpha": peft.alpha,
        "targets": list(peft.targets),
        "rslora": peft.rslora,
        "rank_pattern": dict(peft.rank_pattern),
        "alpha_pattern": dict(peft.alpha_pattern),
    }


def _refuse_contradictions(
    lora: LoraConfig, adopted: Mapping[str, Any], adapter: Adapter, architecture: Architecture
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
            other.append(f"lora.{key} is {given!r}, the adapter's {value!r}")
    if other:
        raise UserError(
            f"lora.init_from: {lora.init_from} says what its factors are, and the config says otherwise: "
            f"{'; '.join(other)}: remove these keys from the config"
        )


def _refuse_foreign(folder: Path, factors: Mapping[str, Any], known: Any, base: Path) -> None:
    foreign = sorted(factors.keys() - set(known))
    if foreign:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: {some_of(foreign)} cannot be adapted in the model in {base}: give an adapter of "
            "this model's attention and MLP linears as lora.init_from"
        )


def _refuse_another_base(folder: Path, base: Path) -> None:
    provenance = read_provenance(folder)
    if provenance is None:
        return
    digest = fingerprint(base)
    if digest != provenance.base_fingerprint:
        raise UserError(
            f"{folder / PROVENANCE_FILE}: base_fingerprint is {provenance.base_fingerprint[:12]}…, but {base} has "
            f"{digest[:12]}…: give the base that the adapter was trained on as model.path, unchanged"
        )
