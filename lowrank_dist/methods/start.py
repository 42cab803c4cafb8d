"""Where Θ starts: from a PEFT LoRA adapter (lora.init_from) in place of fresh factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from lowrank_dist.checkpoint.adapter import CONFIG_FILE, Adapter, read_adapter
from lowrank_dist.config import Config
from lowrank_dist.config.schema import LoraConfig
from lowrank_dist.errors import UserError
from lowrank_dist.lora.adopt import factors_for, refuse_another_base, refuse_foreign, rules_of
from lowrank_dist.lora.placement import ALL_LINEAR, LinearPlacement
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
    refuse_foreign(folder, adapter, architecture.linear_modules(), config.model.path)
    adopted = asdict(rules_of(adapter, architecture))
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
    refuse_another_base(folder, config.model.path)
    return factors_for(folder, read_adapter(folder), placements, config.model.path)


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
