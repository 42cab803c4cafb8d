"""The rotary positions of a layer, and their keys in config.json.

Sources: transformers `modeling_rope_utils.py` and the families' modelling files. YaRN: Peng et al., "YaRN: Efficient
Context Window Extension of Large Language Models", 2023. LongRoPE: Ding et al., 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lowrank_dist.arch.keys import UnsupportedModel, is_number
from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.json import brief

RopeType: TypeAlias = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeParameters:
    """Rotary position embedding: base `theta`, and how `type` scales the frequencies.

    "linear", "llama3" and "yarn" use `factor`; "llama3" also low_freq_factor and high_freq_factor, "yarn" beta_fast,
    beta_slow and truncate, both original_max_positions (in tokens). "longrope" divides the frequencies by short_factors
    in a sample of at most original_max_positions tokens, and by long_factors in a longer one. "dynamic" differs from
    "default" only beyond the model's positions, which no sample exceeds here.

    columns: rotated columns at the start of a head; None = the whole head. interleaved: columns 2i and 2i + 1 are a
    pair (GLM), otherwise i and i + half. scaling: cos and sin are multiplied by it. query_beta: queries at position p
    are multiplied by 1 + query_beta · log(1 + ⌊p / original_max_positions⌋) (Ministral 3).
    """

    theta: float
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    columns: int | None = None
    interleaved: bool = False
    scaling: float = 1.0
    query_beta: float = 0.0

    def rotated(self, head_dim: int) -> int:
        """Return the number of rotated columns of a head."""
        return head_dim if self.columns is None else self.columns


@dataclass(frozen=True)
class RopeTable:
    """The common properties of one family's rotary positions.

    theta: base where config.json gives none. types: the rope types that the family computes. renamed: other name of a
    type → its name here. rotated: fraction of a head that is rotated where config.json gives none; None = the whole
    head always is. interleaved: see RopeParameters. default: rope_parameters where config.json has none.
    original: original_max_position_embeddings where config.json has no such key; None = that of rope_parameters.
    scales_queries: the family reads llama_4_scaling_beta.
    local: (key, base); None = all layers have the same rotary positions. Otherwise rope_parameters has an entry for
    each of FULL and SLIDING. In an older config.json it describes the layers with full attention. The layers with a
    sliding window then have type "default", and their base is the value of `key`, or `base` where that is missing or
    `key` is None.
    """

    theta: float = 10_000.0
    types: tuple[RopeType, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    renamed: Mapping[str, RopeType] = field(default_factory=dict, hash=False)
    rotated: float | None = None
    interleaved: bool = False
    default: Mapping[str, Any] | None = field(default=None, hash=False)
    original: int | None = None
    scales_queries: bool = False
    local: tuple[str | None, float] | None = None


# Values of layer_types.
FULL, SLIDING = "full_attention", "sliding_attention"
# Far beyond any model's numbers. With those outside, frequencies and angles are no finite floats.
_LEAST, _MOST = 1e-6, 10**18
_POSITIVE = "a number from 1e-6 to 1e18"
# Keys of rope_parameters that each type needs, a positive number each: field of RopeParameters → key.
_FACTOR = {"factor": "factor"}
_ORIGINAL = {"original_max_positions": "original_max_position_embeddings"}
_NEEDED: Mapping[RopeType, Mapping[str, str]] = {
    "default": {},
    "linear": _FACTOR,
    "dynamic": _FACTOR,
    "llama3": {
        **_FACTOR,
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        **_ORIGINAL,
    },
    "yarn": {**_FACTOR, **_ORIGINAL},
    "longrope": {**_FACTOR, **_ORIGINAL},
}


def read_rope(
    values: Mapping[str, Any], table: RopeTable, head_dim: int, max_positions: int, where: str, layer_type: str = FULL
) -> RopeParameters:
    """Return the rotary positions of the layers of one type in a config.json.

    They stand in rope_parameters (transformers 5), or in rope_theta and rope_scaling. max_positions: the model's number
    of positions. `where` names the file in messages. Raises UserError for a missing or malformed key, and
    UnsupportedModel for what the layers here cannot compute.
    """
    found = _stated(values, table, layer_type, where)
    kind = found["rope_type"] if "rope_type" in found else found.get("type", "default")
    rope_type = next((each for each in table.types if each == table.renamed.get(str(kind), kind)), None)
    if rope_type is None:
        raise UnsupportedModel(
            f"{where}: rope_type {brief(kind)} (in rope_parameters or rope_scaling) is not supported; use a checkpoint "
            f"with one of {', '.join(table.types)}"
        )
    if found.get("mrope_section") is not None:
        raise UnsupportedModel(
            f"{where}: mrope_section (rotary positions of several axes) is not supported; use a model of text alone"
        )
    names = {"theta": "rope_theta", **_NEEDED[rope_type], **(_ORIGINAL if table.scales_queries else {})}
    if "original_max_positions" in names:
        _set_original(found, values, table, max_positions)
    # Where factor is null (or, for longrope, missing), transformers takes max_positions / the original ones.
    if rope_type in ("yarn", "longrope") and found.get("factor", 0 if rope_type == "yarn" else None) is None:
        original = found["original_max_position_embeddings"]
        found["factor"] = max_positions / original if _is_positive(original) else None
    for key in names.values():
        if not _is_positive(found.get(key)):
            stated = brief(found[key]) if key in found else "nothing"
            raise UserError(f"{where}: rope_type {kind!r} needs {key}, {_POSITIVE}, found {stated}; correct it")
    least = {"yarn": "rope_theta", "longrope": "original_max_position_embeddings"}.get(rope_type)
    if least is not None and found[least] <= 1:  # both take its logarithm as a divisor
        raise UserError(f"{where}: rope_type {kind!r} needs {least} above 1, found {found[least]}; correct it")
    columns = _columns(found, table, head_dim, where)
    return RopeParameters(
        type=rope_type,
        columns=columns,
        interleaved=table.interleaved,
        **{name: found[key] for name, key in names.items()},
        **(_yarn(found, where) if rope_type == "yarn" else {}),
        **(_longrope(found, columns or head_dim, where) if rope_type == "longrope" else {}),
        query_beta=_query_beta(found, where) if table.scales_queries else 0.0,
    )


def _stated(values: Mapping[str, Any], table: RopeTable, layer_type: str, where: str) -> dict[str, Any]:
    """Return the rope parameters of a type of layer as config.json states them, with the family's defaults."""
    found: dict[str, Any] = dict(table.default or {})
    for key in ("rope_parameters", "rope_scaling"):  # the latter wins
        stated = values.get(key)
        if stated is not None and not isinstance(stated, dict):
            raise UserError(f"{where}: {key} must be an object, not {brief(stated)}")
        found = dict(stated) if stated else found
    nested = {key: value for key, value in found.items() if isinstance(value, dict)}
    if table.local is not None and values.get("rope_parameters") is not None:
        # Beside the objects of the two kinds transformers reads only rope_scaling, which it merges into them.
        if len(nested) < len(found) or values.get("rope_scaling"):
            raise UnsupportedModel(
                f"{where}: rope_parameters of this family must be an object for each of {FULL} and {SLIDING}, without "
                "rope_scaling beside it; correct it"
            )
    if nested and (table.local is None or not nested.keys() <= {FULL, SLIDING}):
        raise UnsupportedModel(
            f"{where}: rope_parameters by kind of layer ({', '.join(nested)}) are not supported in this family; use a "
            "checkpoint where all layers have the same rotary positions"
        )
    theta = values.get("rope_theta", table.theta)
    if nested:
        found = dict(nested.get(layer_type, {}))
    if table.local is not None and layer_type == SLIDING:
        base_key, base = table.local
        theta = base if base_key is None else values.get(base_key, base)
        found = found if nested else {}
    found.setdefault("rope_theta", theta)
    if values.get("partial_rotary_factor") is not None:
        found.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    return found


def _set_original(found: dict[str, Any], values: Mapping[str, Any], table: RopeTable, max_positions: int) -> None:
    key = "original_max_position_embeddings"
    # A top-level key of config.json wins over the one in rope_parameters, if those are the same for all layers.
    stated = values.get(key, table.original) if table.local is None else None
    if key in values or stated is not None:
        found[key] = stated
    found.setdefault(key, max_positions)


def _columns(found: Mapping[str, Any], table: RopeTable, head_dim: int, where: str) -> int | None:
    """Return the rotated columns of a head; None where the whole head is rotated."""
    key = "partial_rotary_factor"
    factor = found.get(key, 1.0 if table.rotated is None else table.rotated)
    if table.rotated is None and factor != 1.0:
        raise UnsupportedModel(
            f"{where}: {key}={brief(factor)} is not supported in this family; use a checkpoint that rotates the whole "
            "head"
        )
    if not _is_positive(factor) or factor > 1:
        raise UserError(f"{where}: {key} must be a number above 0 and at most 1, not {brief(factor)}")
    columns = int(head_dim * factor)
    if columns < 2 or columns % 2:
        raise UnsupportedModel(
            f"{where}: {key}={factor} rotates {columns} columns of a head, which is not supported; use a checkpoint "
            "that rotates an even number of them"
        )
    return None if columns == head_dim else columns


def _yarn(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return YaRN's beta_fast, beta_slow and truncate, and its scaling of cos and sin."""
    numbers: dict[str, float | None] = {}
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        value = found.get(key)
        if value not in (None, 0) and not _is_positive(value):
            raise UserError(f"{where}: {key} must be 0 or {_POSITIVE}, not {brief(value)}; correct it")
        numbers[key] = value
    truncate = found.get("truncate", True)
    if not isinstance(truncate, bool):
        raise UserError(f"{where}: truncate must be true or false, not {brief(truncate)}")
    scaling = numbers["attention_factor"]
    if scaling is None:
        above, below = numbers["mscale"], numbers["mscale_all_dim"]
        if not (above and below):
            above, below = 1, 0
        scaling = _mscale(found["factor"], above) / _mscale(found["factor"], below)
    return {
        "beta_fast": numbers["beta_fast"] or 32,
        "beta_slow": numbers["beta_slow"] or 1,
        "truncate": truncate,
        "scaling": scaling,
    }


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(found: Mapping[str, Any], columns: int, where: str) -> dict[str, Any]:
    """Return LongRoPE's factors for short and for long samples, and its scaling of cos and sin."""
    factors = {}
    for key in ("short_factor", "long_factor"):
        value = found.get(key)
        if not (isinstance(value, list) and len(value) == columns // 2 and all(map(_is_positive, value))):
            raise UserError(f"{where}: {key} must be a list of {columns // 2} numbers from 1e-6 to 1e18; correct it")
        factors[f"{key}s"] = tuple(value)
    scaling, factor = found.get("attention_factor"), found["factor"]
    if scaling is None:
        original = found["original_max_position_embeddings"]
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    elif not _is_positive(scaling):
        raise UserError(f"{where}: attention_factor must be {_POSITIVE}, not {brief(scaling)}; correct it")
    return factors | {"scaling": scaling}


def _query_beta(found: Mapping[str, Any], where: str) -> float:
    key = "llama_4_scaling_beta"
    if not (is_number(found.get(key)) and 0 <= found[key] <= _MOST):
        raise UserError(f"{where}: this family needs {key} in rope_parameters, a number from 0 to 1e18")
    return float(found[key])


def _is_positive(value: object) -> bool:
    return is_number(value) and _LEAST <= value <= _MOST  # type: ignore[operator]
