"""A Hugging Face config.json and its family's table → `Architecture`.

An option that the table cannot express raises UnsupportedModel with the key of config.json; nothing is approximated. A
missing optional key has transformers' default; a test compares the tables with transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lowrank_dist.arch.architecture import Architecture, LayerKind, RopeParameters, TensorRule
from lowrank_dist.arch.config_keys import key_rule
from lowrank_dist.arch.families import FAMILIES, OUTPUT_LAYER, Family
from lowrank_dist.arch.keys import Key, is_number
from lowrank_dist.arch.model_files import config_file, read_config
from lowrank_dist.arch.rows import Linear, Part
from lowrank_dist.errors import UserError

# transformers has several names for the same function.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}

# Field of RopeParameters → key of config.json, for each rope_type that `inv_freq` computes.
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

# Values of layer_types, new name first.
_FULL, _SLIDING = ("full_attention", "attention"), ("sliding_attention",)


class UnsupportedModel(UserError):
    """A config.json with a family or an option that no table here expresses. The file itself may be correct."""


def read_architecture(path: Path) -> Architecture:
    """Return the `Architecture` of a config.json; `path` is that file or a model folder with it.

    Raises UserError naming the key that is missing, malformed or (UnsupportedModel) not supported.
    """
    return parse_architecture(read_config(path), str(config_file(path)))


def parse_architecture(values: Mapping[str, Any], where: str) -> Architecture:
    """Return the `Architecture` of a config.json's `values`; `model_type` selects the table.

    `where` names the file in messages. Raises as `read_architecture` does.
    """
    family = _family(values, where)
    _check_options(values, family, where)
    fields: dict[str, Any] = {field: key.read(values, where) for field, key in family.keys.items()}
    fields |= family.fixed
    if fields["ffn"] is None:
        fields["ffn"] = 4 * fields["hidden"]
    _check_equal(values, family, fields, where)
    fields["activation"] = _activation(fields["activation"], family, where)
    _set_heads(fields, family, where)
    layers = _layers(values, family, fields, where)
    del fields["ffn"]
    return Architecture(
        family=values["model_type"],
        prefix=family.prefix,
        **fields | {"layers": layers},
        rope=_rope(values, family, fields, where) if fields["positions"] == "rope" else None,
        tensors=tuple(
            rule for rule in family.tensors if not (_in_layer(rule) or (fields["tied"] and rule is OUTPUT_LAYER))
        ),
        ignored=family.ignored,
    )


def config_notes(path: Path) -> list[str]:
    """Return a line for each option of a model folder's config.json that is not applied, and one for unknown keys.

    Raises as `read_architecture` does.
    """
    values, where = read_config(path), str(config_file(path))
    return key_rule(_family(values, where)).notes(values, where)


def _family(values: Mapping[str, Any], where: str) -> Family:
    if "model_type" not in values:
        raise UserError(f"{where}: key model_type is missing; set it to one of {', '.join(FAMILIES)}")
    name = values["model_type"]
    if not isinstance(name, str):
        raise UserError(f"{where}: model_type must be text, not {name!r}; set it to one of {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"{where}: model_type {name!r} is not supported; use a model of one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def _check_options(values: Mapping[str, Any], family: Family, where: str) -> None:
    for key, meaning in key_rule(family).refusals(values).items():
        raise UnsupportedModel(f"{where}: {key}: {meaning}")
    for key, meaning in family.absent.items():
        if key in values:
            raise UnsupportedModel(f"{where}: {key} is not supported in a {values['model_type']} ({meaning})")
    for key, (supported, meaning) in family.only.items():
        found = Key(key, "flag", supported).read(values, where)
        if found != supported:
            raise UnsupportedModel(
                f"{where}: {key}={found!r} is not supported ({meaning}); use a checkpoint with {key}={supported!r}"
            )


def _check_equal(values: Mapping[str, Any], family: Family, fields: Mapping[str, Any], where: str) -> None:
    for key, (field, meaning) in family.equal.items():
        found = Key(key, "size", None).read(values, where)
        if found not in (None, fields[field]):
            raise UnsupportedModel(
                f"{where}: {key}={found} is not supported ({meaning}); use a checkpoint where it equals "
                f"{family.keys[field].name}={fields[field]}"
            )


def _activation(name: str, family: Family, where: str) -> str:
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"{where}: {family.keys['activation'].name}={name!r} is not supported; "
            f"use a checkpoint with one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _set_heads(fields: dict[str, Any], family: Family, where: str) -> None:
    """Fill in kv_heads and head_dim where they follow from heads and hidden."""
    hidden, heads = fields["hidden"], fields["heads"]
    if fields.get("kv_heads") is None:
        fields["kv_heads"] = heads
    if heads % fields["kv_heads"]:
        raise UserError(
            f"{where}: {family.keys['heads'].name}={heads} is not a multiple of "
            f"{family.keys['kv_heads'].name}={fields['kv_heads']}: correct it"
        )
    if fields.get("head_dim") is not None:
        return
    sizes = f"{family.keys['hidden'].name}={hidden}", f"{family.keys['heads'].name}={heads}"
    if hidden % heads:
        raise UserError(f"{where}: {sizes[0]} is not a multiple of {sizes[1]}; correct it")
    fields["head_dim"] = hidden // heads
    if fields["positions"] == "rope" and fields["head_dim"] % 2:
        raise UserError(
            f"{where}: {sizes[0]} and {sizes[1]} give heads of {fields['head_dim']}, an odd size, but rotary "
            "positions need an even one; correct it"
        )


def _sliding_window(values: Mapping[str, Any], family: Family, layers: int, where: str) -> int | None:
    found = {name: key.read(values, where) for name, key in family.window.items()}
    window: int | None = found.get("window")
    if "used" not in found:
        return window
    if not found["used"]:
        window = None
    kinds = found["kinds"]
    key = family.window["kinds"].name
    if kinds is None:
        first = layers if window is None else min(max(found["first"], 0), layers)
        kinds = [_FULL[0]] * (first > 0) + [_SLIDING[0]] * (first < layers)
    elif len(kinds) != layers:
        raise UserError(f"{where}: {key} has {len(kinds)} entries for {layers} layers; correct it")
    if all(kind in _FULL for kind in kinds):
        return None
    if all(kind in _SLIDING for kind in kinds):
        return window
    raise UnsupportedModel(
        f"{where}: {key} {sorted(set(kinds))} (from {family.window['used'].name} and {family.window['first'].name}) "
        "is not supported; use a checkpoint where all layers have full attention, or all have a sliding window"
    )


def _rope(values: Mapping[str, Any], family: Family, fields: Mapping[str, Any], where: str) -> RopeParameters:
    """Return the rotary parameters, from rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
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
    found.setdefault("rope_theta", values.get("rope_theta", family.rope_theta))
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
        found.setdefault(names["original_max_positions"], fields["max_positions"])
    for key in names.values():
        if key not in found or not is_number(found[key]) or found[key] <= 0:
            stated = found[key] if key in found else "nothing"
            raise UserError(f"{where}: rope_type {kind!r} needs a positive number {key}, found {stated!r}")
    return RopeParameters(type=rope_type, **{field: found[key] for field, key in names.items()})


def _layers(values: Mapping[str, Any], family: Family, fields: Mapping[str, Any], where: str) -> tuple[LayerKind, ...]:
    """Return the layers, all of one kind: no family here mixes kinds."""
    count = fields["layers"]
    tensors = tuple(rule for rule in family.tensors if _in_layer(rule))
    return (LayerKind(_linears(family, fields), tensors, _sliding_window(values, family, count, where)),) * count


def _in_layer(rule: TensorRule) -> bool:
    return "{layer}" in rule.megatron


def _linears(family: Family, fields: Mapping[str, Any]) -> dict[str, Linear]:
    hidden, ffn, head_dim, bias = fields["hidden"], fields["ffn"], fields["head_dim"], fields["linear_bias"]
    queries, keys = fields["heads"] * head_dim, fields["kv_heads"] * head_dim
    fc1_rows = (ffn, ffn) if fields["gated"] else (ffn,)
    paths = family.linears
    return {
        "linear_qkv": Linear(
            module="self_attention.linear_qkv",
            stream=0,
            kind="column",
            in_features=hidden,
            out_features=queries + 2 * keys,
            parts=_qkv_parts(family, queries, keys),
            interleave="qkv",
            bias=bias or fields["qkv_bias"],
            group=(fields["heads"] // fields["kv_heads"], head_dim),
            whole=_leaf(paths["linear_qkv"][0]) if family.fused_qkv else None,
        ),
        "linear_proj": Linear(
            module="self_attention.linear_proj",
            stream=1,
            kind="row",
            in_features=queries,
            out_features=hidden,
            parts=_parts(paths["linear_proj"], (hidden,)),
            interleave="none",
            bias=bias,
        ),
        "linear_fc1": Linear(
            module="mlp.linear_fc1",
            stream=2,
            kind="column",
            in_features=hidden,
            out_features=sum(fc1_rows),
            parts=_parts(paths["linear_fc1"], fc1_rows),
            interleave="gate_up" if fields["gated"] else "none",
            bias=bias,
        ),
        "linear_fc2": Linear(
            module="mlp.linear_fc2",
            stream=3,
            kind="row",
            in_features=ffn,
            out_features=hidden,
            parts=_parts(paths["linear_fc2"], (hidden,)),
            interleave="none",
            bias=bias,
        ),
    }


def _qkv_parts(family: Family, queries: int, keys: int) -> tuple[Part, ...]:
    if not family.fused_qkv:
        return _parts(family.linears["linear_qkv"], (queries, keys, keys))
    (path,) = family.linears["linear_qkv"]
    names = ("q_proj", "k_proj", "v_proj")
    return tuple(Part(name, path, queries, index * queries) for index, name in enumerate(names))


def _parts(paths: tuple[str, ...], rows: tuple[int, ...]) -> tuple[Part, ...]:
    return tuple(Part(_leaf(path), path, count) for path, count in zip(paths, rows, strict=True))


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
