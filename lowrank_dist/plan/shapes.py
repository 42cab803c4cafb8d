"""The sizes of a model, from a built-in table or a Hugging Face config.json. No torch, no transformers."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lowrank_dist.errors import UserError

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Projection:
    """One Hugging Face projection inside a linear: the name users target, its module path, its output rows."""

    name: str
    path: str
    rows: int


@dataclass(frozen=True)
class Linear:
    """A Megatron linear of a layer, whole: kind of sharding, [out, in], and what it is made of.

    whole: path of the one module that holds all projections (GPT-2's c_attn), or None.
    """

    kind: Literal["column", "row"]
    in_features: int
    projections: tuple[Projection, ...]
    bias: bool
    whole: str | None = None

    @property
    def out_features(self) -> int:
        return sum(projection.rows for projection in self.projections)

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Shape:
    """A decoder-only model. position_rows: rows of a learned position table, 0 with rotary positions.

    dtype: what the published weights are in ("fp32" or "bf16"; fp16 runs as bf16). ffn: width of gate and of up each.
    """

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    position_rows: int
    norm: Literal["RMSNorm", "LayerNorm"]
    gated: bool
    activation: Literal["silu", "gelu", "relu"]
    qkv_bias: bool
    linear_bias: bool
    qk_norm: bool
    tied: bool
    dtype: Literal["fp32", "bf16"]

    @cached_property
    def linears(self) -> Mapping[str, Linear]:
        """The four linears of every layer, in the order in which they run."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv, proj, fc1, fc2 = _PATHS[self.family]
        fused = self.family == "gpt2"
        names = ("q_proj", "k_proj", "v_proj") if fused else tuple(path.rpartition(".")[2] for path in qkv)
        paths = qkv * 3 if fused else qkv
        rows = (queries, keys, keys)
        return {
            "linear_qkv": Linear(
                "column",
                self.hidden,
                tuple(Projection(*part) for part in zip(names, paths, rows, strict=True)),
                self.qkv_bias or self.linear_bias,
                qkv[0] if fused else None,
            ),
            "linear_proj": Linear("row", queries, _projections(proj, self.hidden), self.linear_bias),
            "linear_fc1": Linear("column", self.hidden, _projections(fc1, self.ffn), self.linear_bias),
            "linear_fc2": Linear("row", self.ffn, _projections(fc2, self.hidden), self.linear_bias),
        }

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's four weight matrices: what its GEMMs multiply with."""
        return sum(linear.weights for linear in self.linears.values())


def _projections(paths: tuple[str, ...], rows: int) -> tuple[Projection, ...]:
    return tuple(Projection(path.rpartition(".")[2], path, rows) for path in paths)


_LLAMA_PATHS = (
    tuple(f"model.layers.{{layer}}.self_attn.{name}_proj" for name in "qkv"),
    ("model.layers.{layer}.self_attn.o_proj",),
    ("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"),
    ("model.layers.{layer}.mlp.down_proj",),
)
_PATHS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA_PATHS),
    "gpt2": (
        ("transformer.h.{layer}.attn.c_attn",),
        ("transformer.h.{layer}.attn.c_proj",),
        ("transformer.h.{layer}.mlp.c_fc",),
        ("transformer.h.{layer}.mlp.c_proj",),
    ),
    "opt": (
        tuple(f"model.decoder.layers.{{layer}}.self_attn.{name}_proj" for name in "qkv"),
        ("model.decoder.layers.{layer}.self_attn.out_proj",),
        ("model.decoder.layers.{layer}.fc1",),
        ("model.decoder.layers.{layer}.fc2",),
    ),
}

# Field of Shape → key of config.json, for the keys without which there is no plan.
_LLAMA_KEYS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}
_KEYS: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA_KEYS),
    "gpt2": {
        "hidden": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "vocab": "vocab_size",
        "max_positions": "n_positions",
    },
    "opt": {**_LLAMA_KEYS, "ffn": "ffn_dim"},
}
# transformers' names of element types; a checkpoint in fp16 runs in bf16, whose range is fp32's.
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}


def shape_of(values: Mapping[str, Any], name: str, where: str) -> Shape:
    """The Shape that a config.json's `values` describe. `where` names the file in messages.

    Raises UserError for a family without a table, a key that is missing or is no positive integer, and sizes that do
    not fit one another.
    """
    family = values.get("model_type")
    if family not in _KEYS:
        stated = "no model_type" if family is None else f"model_type {family!r}"
        raise UserError(f"{where}: {stated}: a plan needs one of {', '.join(_KEYS)}")
    sizes = {field: _size(values, key, where) for field, key in _KEYS[family].items()}
    if family == "gpt2":
        inner = values.get("n_inner")
        sizes["ffn"] = 4 * sizes["hidden"] if inner is None else _size(values, "n_inner", where)
    heads = sizes["heads"]
    kv_heads = _optional(values, "num_key_value_heads", heads, where) if family in _GATED else heads
    head_dim = _optional(values, "head_dim", None, where) if family in _GATED else None
    if head_dim is None:
        if sizes["hidden"] % heads:
            raise UserError(
                f"{where}: {_KEYS[family]['hidden']}={sizes['hidden']} is not a multiple of "
                f"{_KEYS[family]['heads']}={heads}: correct it"
            )
        head_dim = sizes["hidden"] // heads
    if heads % kv_heads:
        raise UserError(f"{where}: {heads} attention heads are not a multiple of num_key_value_heads={kv_heads}")
    learned = family not in _GATED
    return Shape(
        name=name,
        family=family,
        kv_heads=kv_heads,
        head_dim=head_dim,
        # OPT's table has two rows that are never read, and which are cut off when it is loaded.
        position_rows=sizes["max_positions"] if learned else 0,
        norm="LayerNorm" if learned else "RMSNorm",
        gated=family in _GATED,
        activation=_activation(values, family, where),
        qkv_bias=family == "qwen2" or (learned and _biased(values, family)),
        linear_bias=learned and _biased(values, family),
        qk_norm=family == "qwen3",
        tied=bool(values.get("tie_word_embeddings", learned)),
        dtype=_DTYPES.get(str(values.get("dtype") or values.get("torch_dtype")), "fp32"),
        **sizes,
    )


# Key of the activation and what transformers takes where it is missing; its spellings of the same functions.
_ACTIVATION_KEYS = {"gpt2": ("activation_function", "gelu_new"), "opt": ("activation_function", "relu")}
_ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu"),
    "relu": "relu",
}
_GATED = ("llama", "mistral", "qwen2", "qwen3")


def _biased(values: Mapping[str, Any], family: str) -> bool:
    return family == "gpt2" or bool(values.get("enable_bias", True))


def _activation(values: Mapping[str, Any], family: str, where: str) -> str:
    key, otherwise = _ACTIVATION_KEYS.get(family, ("hidden_act", "silu"))
    name = values.get(key, otherwise)
    if name not in _ACTIVATIONS:
        raise UserError(f"{where}: {key}={name!r} is not supported: use a model with one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _size(values: Mapping[str, Any], key: str, where: str) -> int:
    if key not in values:
        raise UserError(
            f"{where}: {key} is missing, and a plan cannot guess it: add it as in the model's own config.json"
        )
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} must be a positive integer, not {value!r}")
    return value


def _optional(values: Mapping[str, Any], key: str, otherwise: int | None, where: str) -> int | None:
    return otherwise if values.get(key) is None else _size(values, key, where)


def read_shape(folder: Path) -> Shape:
    """The Shape of a model folder, from its config.json and, for the dtype, the headers of its safetensors files."""
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give a folder with a config.json") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object: give a Hugging Face config.json")
    shape = shape_of(values, path.parent.name, str(path))
    stored = _stored_dtype(path.parent)
    return shape if stored is None else replace(shape, dtype=stored)


def _stored_dtype(folder: Path) -> str | None:
    """What most of the first safetensors file is stored in: the loader goes by the files, not by config.json."""
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length)) if length < 2**27 else {}
            sizes: dict[str, int] = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - start
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # the loader will say what is wrong with it; config.json's dtype serves a plan
        largest = max(sizes, key=lambda name: sizes[name], default="")
        return {"F32": "fp32", "BF16": "bf16", "F16": "bf16"}.get(largest)
    return None


def _llama(hidden: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, positions: int, **more: Any) -> dict:
    sizes = (hidden, layers, heads, ffn, vocab, positions)
    keys = dict(zip(_LLAMA_KEYS.values(), sizes, strict=True))
    return {"model_type": "llama", "num_key_value_heads": kv, "dtype": "bfloat16", "tie_word_embeddings": False} | (
        keys | more
    )


def _gpt2(hidden: int, layers: int, heads: int, positions: int, dtype: str = "float32") -> dict:
    keys = dict(zip(_KEYS["gpt2"].values(), (hidden, layers, heads, 50257, positions), strict=True))
    return {"model_type": "gpt2", "dtype": dtype} | keys


# As published: the models' config.json files; GPT-3: Brown et al. 2020, table 2.1, with GPT-2's vocabulary.
_BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "gpt2-medium": _gpt2(1024, 24, 16, 1024),
    "gpt2-large": _gpt2(1280, 36, 20, 1024),
    "gpt3-175b": _gpt2(12288, 96, 96, 2048, "float16"),
    "llama-3-8b": _llama(4096, 32, 32, 8, 14336, 128256, 8192),
    "llama-3-70b": _llama(8192, 80, 64, 8, 28672, 128256, 8192),
    "llama-3-405b": _llama(16384, 126, 128, 8, 53248, 128256, 131072),
    "qwen2.5-7b": _llama(3584, 28, 28, 4, 18944, 152064, 131072, model_type="qwen2"),
    "qwen2.5-72b": _llama(8192, 80, 64, 8, 29568, 152064, 131072, model_type="qwen2"),
    "qwen3-32b": _llama(5120, 64, 64, 8, 25600, 151936, 40960, model_type="qwen3", head_dim=128),
}
BUILT_IN = tuple(_BUILT_IN)


def built_in_config(name: str) -> Mapping[str, Any]:
    """The config.json of a built-in shape, as a mapping."""
    return _BUILT_IN[name]


def find_shape(what: str) -> Shape:
    """The Shape of a built-in name, a model folder or a config.json. UserError for anything else."""
    if what in _BUILT_IN:
        return shape_of(_BUILT_IN[what], what, what)
    path = Path(what)
    if path.exists():
        return read_shape(path)
    match = difflib.get_close_matches(what.lower(), _BUILT_IN, n=1)
    meant = f"did you mean {match[0]}? " if match else ""
    raise UserError(
        f"{what!r} is no shape, model folder or file: {meant}The shapes are {', '.join(_BUILT_IN)}; "
        "any other model is planned from its folder or its config.json"
    )
