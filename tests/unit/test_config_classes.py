"""Every field of transformers' configuration classes is applied, refused, or changes no logits in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_dist.arch.config_json import UnsupportedModel, read_architecture
from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.errors import UserError
from tests.tiny_models import make_tiny
from tests.unit.test_keys import CLASSES, copy_with, logits

# Every file has these two, and other tests vary them.
APART = {"model_type", "dtype", "torch_dtype"}
# Values of fields whose default says nothing of their type, or for which transformers takes few values.
VALUES: dict[str, Any] = {
    "attribute_map": {"rms_norm_eps": "initializer_range"},
    "id2label": {"0": "a", "1": "b"},
    "per_layer_config": {"0": {"intermediate_size": 8}},
    "problem_type": "regression",
    "quantization_config": {"bits": 4},
    "return_dict": True,
    "summary_activation": "tanh",
    "rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 3.0},
    **dict.fromkeys(("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan"), {}),
}
# A size alone contradicts a list beside it, and the error names the list.
NAMED_BY = {
    "num_hidden_layers": ("layer_types", "no_rope_layers"),
    "hidden_size": ("short_factor",),
    "num_attention_heads": ("short_factor",),
}


def another(key: str, value: Any) -> Any:
    """Return a value of a field that is not the model's."""
    if key in VALUES:
        return VALUES[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 or 1
    if isinstance(value, list):
        return value[::-1] if value[::-1] != value else [*value, "x"]
    return {"x": "y"} if isinstance(value, dict) else "x" if isinstance(value, str) else 2


def fields(family: str, stated: dict[str, Any]) -> dict[str, Any]:
    """Return key of config.json → another value, for all fields of the class and its parents."""
    kind = CLASSES[family]
    defaults = kind().to_dict()
    named = {key for each in kind.__mro__ for key in getattr(each, "__dataclass_fields__", {})}
    keys = (named | set(defaults) | {"attribute_map"}) - APART
    return {key: another(key, stated.get(key, defaults.get(key))) for key in sorted(keys)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_class(family: str, tmp_path: Path) -> None:
    base = make_tiny(family, tmp_path / "base")
    ours, silent = read_architecture(base), {}
    applied, refused = set(), set()
    for key, value in fields(family, json.loads((base / "config.json").read_text())).items():
        folder = copy_with(base, tmp_path / f"with-{key}", **{key: value})
        try:
            found = read_architecture(folder)
        except (UserError, UnsupportedModel) as error:
            assert any(name in str(error) for name in (key, *NAMED_BY.get(key, ()))), (key, str(error))
            refused.add(key)
            continue
        if found != ours:
            applied.add(key)
        else:
            silent[key] = value
    # Controls: the loop reaches fields of both kinds.
    assert len(applied) >= 6 and "attribute_map" in refused
    assert torch.equal(logits(copy_with(base, tmp_path / "silent", **silent)), logits(base)), sorted(silent)
