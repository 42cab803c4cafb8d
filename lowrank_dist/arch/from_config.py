"""A transformers config and its family's table → `Architecture`.

What a table cannot express is refused with the key of config.json that asks for it, never approximated.
"""

from collections.abc import Mapping
from typing import Any

from lowrank_dist.arch.architecture import Architecture, RopeParameters
from lowrank_dist.arch.families import FAMILIES, OUTPUT_LAYER, Family
from lowrank_dist.arch.rows import LinearLayout, Part
from lowrank_dist.errors import UserError

# transformers has several spellings of the same function.
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

# Field of RopeParameters → key, for each rope_type that `inv_freq` computes.
_ROPE_KEYS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    },
}


def architecture_of(config: Any, where: str) -> Architecture:
    """The `Architecture` of a transformers config (its `model_type` selects the table).

    `where` names the config.json in messages. Raises UserError, naming the key, for a family or an option that has no
    table here.
    """
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type {config.model_type!r} is not supported: use a model of one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.model_type]
    _check_options(config, family, where)
    fields = {field: getattr(config, key) for field, key in family.keys.items()} | dict(family.fixed)
    if fields["ffn"] is None:
        fields["ffn"] = 4 * fields["hidden"]  # GPT-2's n_inner, null in every published config
    for field in ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "max_positions"):
        if not isinstance(fields[field], int) or fields[field] < 1:
            raise UserError(f"{where}: {family.keys[field]} must be a positive integer, not {fields[field]!r}")
    fields["activation"] = _activation(fields["activation"], family, where)
    fields["head_dim"] = _head_dim(config, fields, family, where)
    if fields["heads"] % fields["kv_heads"]:
        raise UserError(
            f"{where}: {family.keys['heads']}={fields['heads']} is not a multiple of "
            f"{family.keys['kv_heads']}={fields['kv_heads']}: correct it"
        )
    return Architecture(
        family=config.model_type,
        prefix=family.prefix,
        **fields,
        rope=_rope(config, where) if fields["positions"] == "rope" else None,
        sliding_window=_sliding_window(config, family, where),
        linears=_linears(family, fields),
        tensors=tuple(rule for rule in family.tensors if not (fields["tied"] and rule is OUTPUT_LAYER)),
        ignored=family.ignored,
    )


def _check_options(config: Any, family: Family, where: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{where}: quantization_config: quantized checkpoints are not supported: "
            "use the checkpoint in bf16, fp16 or fp32"
        )
    for key, (supported, meaning) in family.only.items():
        # A key that this version of transformers does not know asks for nothing.
        if hasattr(config, key) and getattr(config, key) != supported:
            raise UserError(
                f"{where}: {key}={getattr(config, key)!r} is not supported ({meaning}): "
                f"use a checkpoint with {key}={supported!r}"
            )
    if config.model_type == "opt" and config.word_embed_proj_dim != config.hidden_size:
        raise UserError(
            f"{where}: word_embed_proj_dim={config.word_embed_proj_dim} is not supported (a projection between "
            f"embedding and decoder, as in opt-350m): use a checkpoint where it equals hidden_size={config.hidden_size}"
        )


def _activation(name: str, family: Family, where: str) -> str:
    if name not in _ACTIVATIONS:
        raise UserError(
            f"{where}: {family.keys['activation']}={name!r} is not supported: "
            f"use a checkpoint with one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _head_dim(config: Any, fields: Mapping[str, Any], family: Family, where: str) -> int:
    # GPT-2 and OPT define the width of a head by the division alone; the others honour the key where it is set.
    if fields["positions"] == "rope" and getattr(config, "head_dim", None) is not None:
        head_dim = config.head_dim
        if not isinstance(head_dim, int) or head_dim < 1 or head_dim % 2:
            raise UserError(f"{where}: head_dim must be a positive even integer, not {head_dim!r}")
        return head_dim
    if fields["hidden"] % fields["heads"]:
        raise UserError(
            f"{where}: {family.keys['hidden']}={fields['hidden']} is not a multiple of "
            f"{family.keys['heads']}={fields['heads']}: correct it"
        )
    return fields["hidden"] // fields["heads"]


def _sliding_window(config: Any, family: Family, where: str) -> int | None:
    if family.sliding == "none":
        return None
    if family.sliding == "all":
        return config.sliding_window
    kinds = set(config.layer_types)
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"}:
        return config.sliding_window
    raise UserError(
        f"{where}: layer_types {sorted(kinds)} (from use_sliding_window and max_window_layers) is not supported: "
        "every layer must have full attention, or every layer a sliding window"
    )


def _rope(config: Any, where: str) -> RopeParameters:
    """transformers 5 keeps everything in rope_parameters; before, rope_theta and rope_scaling stood apart."""
    found = getattr(config, "rope_parameters", None)
    if found is None:
        found = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    kind = found["rope_type"] if "rope_type" in found else found["type"] if "type" in found else "default"
    if kind not in _ROPE_KEYS:
        raise UserError(
            f"{where}: rope_type {kind!r} (in rope_parameters or rope_scaling) is not supported: "
            f"use a checkpoint with one of {', '.join(_ROPE_KEYS)}"
        )
    if "partial_rotary_factor" in found and found["partial_rotary_factor"] != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor={found['partial_rotary_factor']} is not supported: "
            "use a checkpoint that rotates the whole head"
        )
    values = {"theta": "rope_theta", **_ROPE_KEYS[kind]}
    for key in values.values():
        if key not in found or not isinstance(found[key], (int, float)) or found[key] <= 0:
            stated = found[key] if key in found else "nothing"
            raise UserError(f"{where}: rope_type {kind!r} needs a positive number {key}, found {stated!r}")
    return RopeParameters(type=kind, **{field: found[key] for field, key in values.items()})


def _linears(family: Family, fields: Mapping[str, Any]) -> dict[str, LinearLayout]:
    hidden, ffn, head_dim, bias = fields["hidden"], fields["ffn"], fields["head_dim"], fields["linear_bias"]
    queries, keys = fields["heads"] * head_dim, fields["kv_heads"] * head_dim
    fc1_rows = (ffn, ffn) if fields["gated"] else (ffn,)
    paths = family.linears
    return {
        "linear_qkv": LinearLayout(
            kind="column",
            in_features=hidden,
            out_features=queries + 2 * keys,
            parts=_qkv_parts(family, queries, keys),
            interleave="qkv",
            bias=bias or fields["qkv_bias"],
            group=(fields["heads"] // fields["kv_heads"], head_dim),
            whole=_leaf(paths["linear_qkv"][0]) if family.fused_qkv else None,
        ),
        "linear_proj": LinearLayout("row", queries, hidden, _parts(paths["linear_proj"], (hidden,)), "none", bias),
        "linear_fc1": LinearLayout(
            kind="column",
            in_features=hidden,
            out_features=sum(fc1_rows),
            parts=_parts(paths["linear_fc1"], fc1_rows),
            interleave="gate_up" if fields["gated"] else "none",
            bias=bias,
        ),
        "linear_fc2": LinearLayout("row", ffn, hidden, _parts(paths["linear_fc2"], (hidden,)), "none", bias),
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
