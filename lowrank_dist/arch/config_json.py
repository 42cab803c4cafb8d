"""A Hugging Face config.json and its family's table → `Architecture`.

An option that the table cannot express raises UnsupportedModel with the key of config.json; nothing is approximated. A
missing optional key has transformers' default; a test compares the tables with transformers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_dist.arch.architecture import Architecture, LayerKind, TensorRule
from lowrank_dist.arch.config_keys import key_rule
from lowrank_dist.arch.families import FAMILIES, OUTPUT_LAYER, Family
from lowrank_dist.arch.keys import Key, UnsupportedModel
from lowrank_dist.arch.model_files import WRAPPERS, config_file, read_config
from lowrank_dist.arch.rope import FULL, SLIDING, read_rope
from lowrank_dist.arch.rows import Linear, Part
from lowrank_dist.arch.wrappers import PUBLISHED_NAMES, TextPart, text_part
from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.json import brief

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

# Values of layer_types, new name first.
_FULL, _SLIDING = (FULL, "attention"), (SLIDING,)


def read_architecture(path: Path) -> Architecture:
    """Return the `Architecture` of a config.json; `path` is that file or a model folder with it.

    Raises UserError naming the key that is missing, malformed or (UnsupportedModel) not supported.
    """
    return parse_architecture(read_config(path), str(config_file(path)))


def parse_architecture(values: Mapping[str, Any], where: str) -> Architecture:
    """Return the `Architecture` of a config.json's `values`; `model_type` selects the table.

    `where` names the file in messages. Raises as `read_architecture` does.
    """
    text = _text(values, where)
    name, family, values, where = values["model_type"], text.family, text.values, text.where
    _check_options(values, family, where)
    fields: dict[str, Any] = {field: key.read(values, where) for field, key in family.keys.items()}
    fields |= family.fixed
    fields |= {field: value(fields) for field, value in family.derived.items()}
    if fields["ffn"] is None:
        fields["ffn"] = 4 * fields["hidden"]
    _check_equal(values, family, fields, where)
    fields["activation"] = _activation(fields["activation"], family, where)
    _set_heads(fields, family, where)
    layers = _layers(values, family, fields, where)
    del fields["ffn"]
    return Architecture(
        family=name,
        prefix=family.prefix,
        published_names=() if text.outer is None else PUBLISHED_NAMES,
        **fields | {"layers": layers},
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
    text = _text(values, where)
    outer = [] if text.outer is None else text.outer.notes(values, where)
    return outer + key_rule(text.family).notes(text.values, text.where)


def _text(values: Mapping[str, Any], where: str) -> TextPart:
    """Return the model of text that a config.json is, or that one of images and text has inside."""
    names = ", ".join([*FAMILIES, *WRAPPERS])
    if "model_type" not in values:
        raise UserError(f"{where}: key model_type is missing; set it to one of {names}")
    name = values["model_type"]
    if not isinstance(name, str):
        raise UserError(f"{where}: model_type must be text, not {name!r}; set it to one of {names}")
    if name in WRAPPERS:
        return text_part(values, where)
    if name not in FAMILIES:
        raise UnsupportedModel(f"{where}: model_type {brief(name)} is not supported; use a model of one of {names}")
    return TextPart(FAMILIES[name], values, where)


def _check_options(values: Mapping[str, Any], family: Family, where: str) -> None:
    for key, meaning in key_rule(family).refusals(values).items():
        raise UnsupportedModel(f"{where}: {key}: {meaning}")
    for key, meaning in family.absent.items():
        if key in values:
            raise UnsupportedModel(f"{where}: {key} is not supported in a {values['model_type']} ({meaning})")
    for key, (supported, meaning) in family.only.items():
        found = Key(key, "number" if supported is None else "flag", supported).read(values, where)
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


def _rotated_layers(values: Mapping[str, Any], family: Family, layers: int, where: str) -> list[bool]:
    """Return whether each layer rotates its queries and keys."""
    if not family.no_rope:
        return [True] * layers
    flags, interval = (family.no_rope[name].read(values, where) for name in ("flags", "interval"))
    if flags is None:
        return [bool((layer + 1) % interval) for layer in range(layers)]
    if len(flags) < layers:
        name = family.no_rope["flags"].name
        raise UserError(f"{where}: {name} has {len(flags)} entries for {layers} layers; correct it")
    return [bool(flag) for flag in flags[:layers]]


def _sliding_windows(
    values: Mapping[str, Any], family: Family, rotated: Sequence[bool], where: str
) -> list[int | None]:
    """Return each layer's sliding window; None for a layer with full attention. rotated: from `_rotated_layers`."""
    found = {name: key.read(values, where) for name, key in family.window.items()}
    window: int | None = found.get("window")
    layers = len(rotated)
    if "kinds" not in found:
        return [window] * layers
    if not found.get("used", True):
        window = None
    kinds, key = found["kinds"], family.window["kinds"].name
    if kinds is None:
        interval = found.get("interval", family.full_every)
        if interval is not None:
            return [window if (layer + 1) % interval else None for layer in range(layers)]
        if "first" not in found:
            return [None if rotates else window for rotates in rotated]
        first = layers if window is None else min(max(found["first"], 0), layers)
        return [None] * first + [window] * (layers - first)
    if len(kinds) != layers:
        raise UserError(f"{where}: {key} has {len(kinds)} entries for {layers} layers; correct it")
    unknown = sorted(set(kinds).difference(_FULL, _SLIDING))
    if unknown:
        raise UnsupportedModel(
            f"{where}: {key} {unknown} is not supported; use a checkpoint whose layers are {_FULL[0]} or {_SLIDING[0]}"
        )
    if window is None and set(kinds).intersection(_SLIDING):
        # transformers fails, or has windows in some implementations of attention and none in others.
        raise UnsupportedModel(
            f"{where}: {key} has {_SLIDING[0]}, but no window is used; set {family.window['used'].name} to true and "
            f"{family.window['window'].name} to the window, or {key} to {_FULL[0]}"
        )
    return [window if kind in _SLIDING else None for kind in kinds]


def _layers(values: Mapping[str, Any], family: Family, fields: Mapping[str, Any], where: str) -> tuple[LayerKind, ...]:
    """Return the kind of each layer. Layers that are alike share one object."""
    linears, tensors = _linears(family, fields), tuple(rule for rule in family.tensors if _in_layer(rule))
    ropes = {}
    if fields["positions"] == "rope":
        ropes = {
            layer_type: read_rope(values, family.rope, fields["head_dim"], fields["max_positions"], where, layer_type)
            for layer_type in (FULL, SLIDING)
        }
    rotated = _rotated_layers(values, family, fields["layers"], where)
    described = list(zip(_sliding_windows(values, family, rotated, where), rotated, strict=True))
    kinds = {
        (window, rotates): LayerKind(
            linears, tensors, window, ropes.get(FULL if window is None else SLIDING) if rotates else None
        )
        for window, rotates in dict.fromkeys(described)
    }
    return tuple(kinds[each] for each in described)


def _in_layer(rule: TensorRule) -> bool:
    return "{layer}" in rule.megatron


def _linears(family: Family, fields: Mapping[str, Any]) -> dict[str, Linear]:
    hidden, ffn, head_dim = fields["hidden"], fields["ffn"], fields["head_dim"]
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
            parts=_parts(paths["linear_qkv"], (queries, keys, keys), ("q_proj", "k_proj", "v_proj")),
            interleave="qkv",
            bias=fields["qkv_bias"],
            group=(fields["heads"] // fields["kv_heads"], head_dim),
            whole=_whole(paths["linear_qkv"], 3),
        ),
        "linear_proj": Linear(
            module="self_attention.linear_proj",
            stream=1,
            kind="row",
            in_features=queries,
            out_features=hidden,
            parts=_parts(paths["linear_proj"], (hidden,)),
            interleave="none",
            bias=fields["proj_bias"],
        ),
        "linear_fc1": Linear(
            module="mlp.linear_fc1",
            stream=2,
            kind="column",
            in_features=hidden,
            out_features=sum(fc1_rows),
            parts=_parts(paths["linear_fc1"], fc1_rows, ("gate_proj", "up_proj")),
            interleave="gate_up" if fields["gated"] else "none",
            bias=fields["mlp_bias"],
            whole=_whole(paths["linear_fc1"], len(fc1_rows)),
        ),
        "linear_fc2": Linear(
            module="mlp.linear_fc2",
            stream=3,
            kind="row",
            in_features=ffn,
            out_features=hidden,
            parts=_parts(paths["linear_fc2"], (hidden,)),
            interleave="none",
            bias=fields["mlp_bias"],
        ),
    }


def _parts(paths: tuple[str, ...], rows: tuple[int, ...], names: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """Return the projections of a linear. names: one per projection, for a module that stacks them in this order."""
    if _whole(paths, len(rows)) is None:
        return tuple(Part(_leaf(path), path, count) for path, count in zip(paths, rows, strict=True))
    return tuple(
        Part(name, paths[0], count, sum(rows[:index]))
        for index, (name, count) in enumerate(zip(names, rows, strict=True))
    )


def _whole(paths: tuple[str, ...], parts: int) -> str | None:
    """Return the name of the module that stacks all projections of a linear; None where each has its own module."""
    return _leaf(paths[0]) if len(paths) < parts else None


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
