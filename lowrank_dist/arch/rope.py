"""The rotary positions of a layer, and their keys in config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lowrank_dist.arch.keys import UnsupportedModel, is_number
from lowrank_dist.errors import UserError


@dataclass(frozen=True)
class RopeParameters:
    """Rotary position embedding: base `theta` and the scaling of its frequencies.

    Type "linear" uses `factor`; type "llama3" uses all fields. original_max_positions: in tokens.
    """

    theta: float
    type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


# Field of RopeParameters → key of config.json, for each rope_type that `model/rope.py` computes.
_ROPE_KEYS: Mapping[Literal["default", "linear", "llama3"], Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    },
}


def read_rope(values: Mapping[str, Any], theta: float, max_positions: int, where: str) -> RopeParameters:
    """Return the rotary positions of a config.json.

    They stand in rope_parameters (transformers 5), or in rope_theta and rope_scaling. theta: the family's default.
    max_positions: the model's number of positions. `where` names the file in messages.
    Raises UserError for a missing or malformed key, and UnsupportedModel for what the layers here cannot compute.
    """
    found: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):  # the latter wins
        stated = values.get(key)
        if stated is not None and not isinstance(stated, dict):
            raise UserError(f"{where}: {key} must be an object, not {stated!r}")
        found = dict(stated) if stated else found
    nested = [key for key, value in found.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModel(
            f"{where}: rope_parameters by kind of layer ({', '.join(nested)}) are not supported; use a checkpoint "
            "where all layers have the same rotary positions"
        )
    found.setdefault("rope_theta", values.get("rope_theta", theta))
    if values.get("partial_rotary_factor") is not None:
        found.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    kind = found["rope_type"] if "rope_type" in found else found.get("type", "default")
    rope_type = next((each for each in _ROPE_KEYS if each == kind), None)
    if rope_type is None:
        raise UnsupportedModel(
            f"{where}: rope_type {kind!r} (in rope_parameters or rope_scaling) is not supported; use a checkpoint "
            f"with one of {', '.join(_ROPE_KEYS)}"
        )
    if "partial_rotary_factor" in found and found["partial_rotary_factor"] != 1.0:
        raise UnsupportedModel(
            f"{where}: partial_rotary_factor={found['partial_rotary_factor']!r} is not supported; use a checkpoint "
            "that rotates the whole head"
        )
    names = {"theta": "rope_theta", **_ROPE_KEYS[rope_type]}
    if "original_max_positions" in names:
        found.setdefault(names["original_max_positions"], max_positions)
    for key in names.values():
        if key not in found or not is_number(found[key]) or found[key] <= 0:
            stated = found[key] if key in found else "nothing"
            raise UserError(f"{where}: rope_type {kind!r} needs a positive number {key}, found {stated!r}")
    return RopeParameters(type=rope_type, **{field: found[key] for field, key in names.items()})
