"""config.json as arch reads it, compared with transformers: defaults, spellings and refusals."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.glm4.modeling_glm4 import Glm4RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from lowrank_dist.arch import families
from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import UnsupportedModel, parse_architecture, read_architecture
from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.arch.model_files import BUILT_IN, built_in_config, declared_dtype, hub_hint, stored_dtype
from lowrank_dist.arch.rope import RopeParameters
from lowrank_dist.data.tokenizer import load_tokenizer
from lowrank_dist.engine.planning import find_model, job_of, read_request
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import check_checkpoint, open_checkpoint
from lowrank_dist.methods.lora.files import read_adapter
from lowrank_dist.model.rope import inv_freq
from lowrank_dist.planner.parameters import frozen_size
from tests.tiny_models import FAMILY_NAMES, make_tiny

Values = dict[str, Any]
transformers.logging.set_verbosity_error()

OURS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# The activations that our tables have; transformers knows many more.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
WRONG = [None, "x", True, 1.5, [2], {"a": 1}, -2, 0]

BY_KIND = ("gemma3_text", "olmo3")  # rotary positions by kind of layer
LLAMA_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
SIZES = {
    **dict.fromkeys(FAMILIES, LLAMA_SIZES),
    "gpt2": ("n_embd", "n_layer", "n_head", "vocab_size"),
    "opt": ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "vocab_size"),
}
ROPE = {
    "rope_theta": st.sampled_from([5e5, 1e6, 10000, None, "x", -1.0]),
    "rope_scaling": st.sampled_from(
        [None, {}, {"type": "linear", "factor": 2.0}, {"type": "yarn", "factor": 2.0}, {"type": "other", "factor": 2.0}]
    ),
    "rope_parameters": st.one_of(
        st.sampled_from([None, {}, "x", [1], {"rope_type": None}, {"full_attention": {"rope_theta": 2.0}}]),
        st.fixed_dictionaries(
            {"rope_type": st.sampled_from(["default", "linear", "llama3", "dynamic", "yarn", "longrope", "other"])},
            optional={
                "rope_theta": st.sampled_from([7.0, 3, None, "x", -1.0]),
                "factor": st.sampled_from([4.0, 2, 0.0, "x", None]),
                "low_freq_factor": st.just(1.0),
                "high_freq_factor": st.just(4.0),
                "original_max_position_embeddings": st.sampled_from([128, None]),
                "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
                "attention_factor": st.sampled_from([0.5, None]),
                "beta_fast": st.sampled_from([16.0, None]),
                "beta_slow": st.sampled_from([2, None]),
                "mscale": st.sampled_from([0.7, None]),
                "mscale_all_dim": st.sampled_from([1.5, 0.0, None]),
                "truncate": st.booleans(),
                "short_factor": st.sampled_from([[1.0 + i / 9 for i in range(8)], [1.5] * 4, [2.0] * 3, None]),
                "long_factor": st.sampled_from([[3.0 + i / 7 for i in range(8)], [2.5] * 4]),
                "llama_4_scaling_beta": st.sampled_from([0.2, None, "x"]),
            },
        ),
    ),
    "partial_rotary_factor": st.sampled_from([None, 1.0, 0.5]),
    "original_max_position_embeddings": st.just(77),
}
NUMBER = st.sampled_from([1e-5, 1e-6, 0.0, None, "x", True, [1], -1.0])
MULTIPLIER = st.sampled_from([0.22, 12, 0, None, "x", True, [1], -1.0])
FLAG = st.sampled_from([True, False, None, 0, "x"])


def size(*good: int) -> st.SearchStrategy[Any]:
    return st.one_of(st.sampled_from(good), st.sampled_from(good), st.sampled_from(WRONG))


ACTIVATION = st.one_of(st.sampled_from(ACTIVATIONS), st.sampled_from(["quick_gelu", None, 3, ["silu"]]))
LLAMA = {
    "num_key_value_heads": size(1, 2, 4, 3),
    "head_dim": size(8, 24, 15),
    "max_position_embeddings": size(64, 4096),
    "rms_norm_eps": NUMBER,
    "hidden_act": ACTIVATION,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    **ROPE,
}
QWEN = LLAMA | {
    "use_sliding_window": FLAG,
    "sliding_window": size(32),
    "max_window_layers": st.sampled_from([0, 1, 3, 28, -1, None, "x", 1.5]),
    "layer_types": st.one_of(
        st.just(None),
        st.lists(
            st.sampled_from(["full_attention", "sliding_attention", "attention", "other"]), min_size=1, max_size=3
        ),
        st.sampled_from(["x", [1, 2, 3]]),
    ),
}
SMOLLM3 = {key: value for key, value in QWEN.items() if key != "max_window_layers"} | {
    "no_rope_layers": st.sampled_from([None, [1, 1, 0], [0] * 5, [1], "x", [2, 1, 0]]),
    "no_rope_layer_interval": size(2, 4),
    "mlp_bias": FLAG,
}
_NESTED_ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "other"])},
    optional={
        "rope_theta": st.sampled_from([7.0, 3, None, "x", -1.0]),
        "factor": st.sampled_from([4.0, 2, 0.0, "x", None]),
        "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
    },
)
GEMMA3 = {key: LLAMA[key] for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")} | {
    "hidden_activation": ACTIVATION,
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "use_bidirectional_attention"), FLAG),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), st.sampled_from([None, None, 30.0, "x"])),
    "query_pre_attn_scalar": size(24, 100),
    "sliding_window": size(32),
    "sliding_window_pattern": size(1, 2, 3),
    "layer_types": st.one_of(
        st.just(None), st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=1, max_size=3)
    ),
    "rope_theta": ROPE["rope_theta"],
    "rope_local_base_freq": st.sampled_from([5e5, 3, None, "x", -1.0]),
    "rope_scaling": st.sampled_from([None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "other"}]),
    "rope_parameters": st.one_of(
        st.sampled_from([None, {}, "x", [1], {"rope_type": "linear", "factor": 2.0}, {"chunked_attention": {}}]),
        st.fixed_dictionaries({}, optional=dict.fromkeys(("full_attention", "sliding_attention"), _NESTED_ROPE)),
    ),
}
OPTIONAL: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "smollm3": SMOLLM3,
    "seed_oss": LLAMA | {"attention_out_bias": FLAG, "mlp_bias": FLAG},
    "phi3": {key: value for key, value in LLAMA.items() if key != "attention_bias"}
    | {"sliding_window": size(32), "original_max_position_embeddings": st.sampled_from([16, 64])}
    | {"partial_rotary_factor": st.sampled_from([1.0, 0.5])},
    "llama": LLAMA | {"mlp_bias": FLAG},
    "granite": LLAMA | {"mlp_bias": FLAG, **dict.fromkeys(MULTIPLIERS, MULTIPLIER)},
    **dict.fromkeys(
        ("mistral", "ministral3"),
        {key: value for key, value in LLAMA.items() if key != "attention_bias"} | {"sliding_window": size(32)},
    ),
    "qwen2": {key: value for key, value in QWEN.items() if key != "attention_bias"},
    "qwen3": QWEN,
    "olmo2": LLAMA,
    "olmo3": {key: value for key, value in LLAMA.items() if key not in ROPE}
    | {key: GEMMA3[key] for key in ("sliding_window", "layer_types", "rope_theta", "rope_scaling", "rope_parameters")},
    "glm4": LLAMA | {"partial_rotary_factor": st.sampled_from([1.0, 0.5])},
    "gemma3_text": GEMMA3,
    "gpt2": {
        "hidden_size": size(32),
        "num_hidden_layers": size(3),
        "num_attention_heads": size(2),
        "max_position_embeddings": size(32),
        "n_inner": size(96),
        "n_positions": size(64),
        "layer_norm_epsilon": NUMBER,
        "activation_function": ACTIVATION,
        "tie_word_embeddings": FLAG,
        "scale_attn_weights": FLAG,
        "scale_attn_by_inverse_layer_idx": FLAG,
        "add_cross_attention": FLAG,
    },
    "opt": {
        "max_position_embeddings": size(64),
        "activation_function": ACTIVATION,
        "enable_bias": FLAG,
        "tie_word_embeddings": FLAG,
        "do_layer_norm_before": FLAG,
        "layer_norm_elementwise_affine": FLAG,
        "_remove_final_layer_norm": FLAG,
        "word_embed_proj_dim": size(64, 32),
    },
}


def configs(family: str) -> st.SearchStrategy[Values]:
    """Draw a config.json of the family: sizes, sometimes one of them wrong or missing, and a few of the other keys."""
    good = dict.fromkeys(SIZES[family], st.just(64))
    good[SIZES[family][1]] = st.sampled_from([1, 2, 3])
    good[SIZES[family][2]] = st.sampled_from([4, 4, 4, 3])
    keys = st.lists(st.sampled_from(sorted(OPTIONAL[family])), max_size=5, unique=True)
    others = keys.flatmap(lambda names: st.fixed_dictionaries({name: OPTIONAL[family][name] for name in names}))
    wrong = st.one_of(
        st.just({}), st.just({}), st.dictionaries(st.sampled_from(SIZES[family]), st.sampled_from(WRONG), max_size=1)
    )
    missing = st.one_of(st.none(), st.none(), st.none(), st.sampled_from(SIZES[family]))

    def put_together(parts: tuple[Values, Values, Values, str | None]) -> Values:
        sizes, rest, faults, gone = parts
        values = {"model_type": family, **sizes, **faults, **rest}
        return {key: value for key, value in values.items() if key != gone}

    return st.tuples(st.fixed_dictionaries(good), others, wrong, missing).map(put_together)


def minimal_config(family: str) -> Values:
    """Return a config.json with nothing but sizes."""
    return {"model_type": family, **dict.fromkeys(SIZES[family], 64), SIZES[family][2]: 32}


def by_transformers(values: Values) -> PreTrainedConfig | None:
    """Return the config that transformers makes of a config.json, or None where it refuses it."""
    rest = copy.deepcopy(values)
    try:
        return AutoConfig.for_model(rest.pop("model_type"), **rest)
    except Exception:  # its validators raise types with no common base
        return None


def expected(config: PreTrainedConfig) -> Values:
    """Return the expected fields of `Architecture`, from transformers' own names as its modelling code reads them."""
    learned = config.model_type in ("gpt2", "opt")
    ffn = {"gpt2": "n_inner", "opt": "ffn_dim"}.get(config.model_type, "intermediate_size")
    eps = {"gpt2": "layer_norm_epsilon", "opt": None}.get(config.model_type, "rms_norm_eps")
    window = getattr(config, "sliding_window", None) if config.model_type != "llama" else None
    kinds = ["sliding_attention"] * config.num_hidden_layers
    if config.model_type in ("qwen2", "qwen3", "smollm3", *BY_KIND):
        kinds = config.layer_types
    rotated = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    if config.model_type in BY_KIND:
        by_kind = {kind: expected_rope(config, config.rope_parameters[kind], layer_type=kind) for kind in set(kinds)}
        ropes = [by_kind[kind] for kind in kinds]
    else:
        rope = None if learned else expected_rope(config, config.rope_parameters)
        ropes = [rope if rotates else None for rotates in rotated[: config.num_hidden_layers]]
    gemma, scalar = config.model_type == "gemma3_text", getattr(config, "query_pre_attn_scalar", None)
    return {
        "family": config.model_type,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "ffn": getattr(config, ffn) or 4 * config.hidden_size,
        "vocab": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "norm_eps": 1e-5 if eps is None else getattr(config, eps),
        **expected_biases(config),
        "tied": config.tie_word_embeddings,
        "embedding_multiplier": config.hidden_size**0.5 if gemma else getattr(config, "embedding_multiplier", 1.0),
        "attention_multiplier": scalar**-0.5 if scalar else getattr(config, "attention_multiplier", None),
        "residual_multiplier": getattr(config, "residual_multiplier", 1.0),
        "logits_divisor": getattr(config, "logits_scaling", 1.0),
        "windows": [window if kind == "sliding_attention" else None for kind in kinds],
        "ropes": ropes,
    }


def expected_biases(config: PreTrainedConfig) -> dict[str, bool]:
    """Return which linears have biases, as the families' modelling code builds them."""
    everywhere = config.model_type == "gpt2" or getattr(config, "enable_bias", False)
    attention = getattr(config, "attention_bias", False)
    return {
        "qkv_bias": everywhere or config.model_type == "qwen2" or attention,
        "proj_bias": everywhere or getattr(config, "attention_out_bias", attention and config.model_type != "glm4"),
        "mlp_bias": everywhere or getattr(config, "mlp_bias", False),
    }


# Keys of rope_parameters that must be positive numbers.
NEEDED = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "dynamic": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("rope_theta", "original_max_position_embeddings"),
    "longrope": ("rope_theta", "original_max_position_embeddings"),
}


def expected_rope(config: PreTrainedConfig, stated: Values, **kind: str) -> list[Any]:
    """Return frequencies of short and long samples, scaling of cos and sin, and queries' beta, as transformers does.

    stated: the rope parameters of the config, or those of one kind of layer, named by layer_type.
    """
    if stated["rope_type"] == "default":
        table = Gemma3RotaryEmbedding if kind else LlamaRotaryEmbedding
        table = {"phi3": Phi3RotaryEmbedding, "glm4": Glm4RotaryEmbedding}.get(config.model_type, table)
        found = [table.compute_default_rope_parameters(config, **kind)] * 2
    else:
        compute = ROPE_INIT_FUNCTIONS[stated["rope_type"]]
        found = [compute(config, **kind)]  # which completes config.rope_parameters
        longer = stated["original_max_position_embeddings"] + 1 if stated["rope_type"] == "longrope" else None
        found.append(compute(config, seq_len=longer, **kind))
    original = stated.get("original_max_position_embeddings")
    beta = (stated["llama_4_scaling_beta"], original) if config.model_type == "ministral3" else (0.0, None)
    return [found[0][0].tolist(), found[1][0].tolist(), found[0][1], *beta]


def found_rope(rope: RopeParameters | None, head_dim: int) -> list[Any] | None:
    if rope is None:
        return None
    columns = rope.rotated(head_dim)
    frequencies = [inv_freq(rope, columns, long=long).tolist() for long in (False, True)]
    return [*frequencies, rope.scaling, rope.query_beta, rope.original_max_positions if rope.query_beta else None]


def found_in(values: Values) -> Values:
    architecture = parse_architecture(copy.deepcopy(values), "config.json")
    x = torch.linspace(-3, 3, 50)
    default = {"gpt2": "gelu_new", "opt": "relu", "gemma3_text": "gelu_pytorch_tanh"}.get(architecture.family, "silu")
    spelled = values.get(FAMILIES[architecture.family].keys["activation"].name, default)
    torch.testing.assert_close(OURS[architecture.activation](x), ACT2FN[spelled](x), rtol=0, atol=1e-6)
    layers = architecture.layers
    assert len({kind.ffn for kind in layers}) == 1, "the MLPs are alike"
    counted = {
        "layers": len(layers),
        "ffn": layers[0].ffn,
        "ropes": [found_rope(kind.rope, architecture.head_dim) for kind in layers],
        "windows": [kind.sliding_window for kind in layers],
    }
    names = expected(AutoConfig.for_model("llama")).keys() - counted.keys()
    return {field: getattr(architecture, field) for field in names} | counted


def has_no_table(values: Values, config: PreTrainedConfig) -> bool:
    """Return whether we must refuse a config that transformers accepts: an impossible or missing size, or an option
    that our tables lack.
    """
    if any(key not in values for key in SIZES[config.model_type] if not _aliased(key, values)):
        return True
    numbers = [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size]
    numbers.append(config.max_position_embeddings)
    optional = ("intermediate_size", "ffn_dim", "n_inner", "num_key_value_heads", "word_embed_proj_dim")
    numbers += [getattr(config, key) for key in optional if getattr(config, key, None) is not None]
    if config.model_type != "llama" and values.get("sliding_window") is not None:
        numbers.append(values["sliding_window"])
    if config.model_type == "gemma3_text":
        numbers += [config.sliding_window, config.query_pre_attn_scalar, values.get("sliding_window_pattern", 6)]
    if config.model_type in ("qwen2", "qwen3", "smollm3") and "sliding_attention" in config.layer_types:
        if config.sliding_window is None or not config.use_sliding_window:
            return True  # its forward pass fails, or depends on the implementation of attention
    eps = [getattr(config, key, 1.0) for key in ("rms_norm_eps", "layer_norm_epsilon")]
    # transformers does not check the type of a key under its alias.
    if any(type(number) is not int or number < 1 for number in numbers) or min(eps) < 0:
        return True
    multipliers = [getattr(config, key, 1.0) for key in MULTIPLIERS]
    if any(type(number) not in (int, float) or number <= 0 for number in multipliers):
        return True
    acts = [getattr(config, key, "silu") for key in ("hidden_act", "activation_function", "hidden_activation")]
    only = {
        "gemma3_text": {
            "use_bidirectional_attention": False,
            **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping")),
        },
        "gpt2": {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        "opt": {
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "word_embed_proj_dim": config.hidden_size,
        },
    }.get(config.model_type, {})
    wanted = {key: getattr(config, key) for key in only}
    if not set(acts) <= set(ACTIVATIONS) or wanted != only:
        return True
    if config.num_attention_heads % getattr(config, "num_key_value_heads", 1):
        return True
    return _heads_or_rope_without_table(values, config)


def _heads_or_rope_without_table(values: Values, config: PreTrainedConfig) -> bool:
    divides = config.hidden_size % config.num_attention_heads == 0
    if config.model_type in ("gpt2", "opt"):
        return not divides
    stated = values.get("head_dim", getattr(type(config), "head_dim", None))
    if stated is None and not divides:
        return True
    head_dim = config.hidden_size // config.num_attention_heads if stated is None else stated
    # GraniteConfig has no such key, so any value passes, and yet its modelling code reads it.
    if type(head_dim) is not int or head_dim < 1 or head_dim % 2:
        return True
    # Layers of the other kind of rotary positions would have no window that tells them apart.
    if config.model_type == "olmo3" and config.sliding_window is None:
        return True
    if config.model_type not in BY_KIND:
        return has_no_rope(config, config.rope_parameters, head_dim)
    parameters, kinds = values.get("rope_parameters") or {}, {"full_attention", "sliding_attention"}
    if not parameters.keys() <= kinds or (parameters and values.get("rope_scaling")):
        return True
    return any(has_no_rope(config, config.rope_parameters[kind], head_dim) for kind in kinds)


def has_no_rope(config: PreTrainedConfig, rope: Values, head_dim: int) -> bool:
    """Return whether we must refuse the rotary positions of a config that transformers accepts."""
    types = ("default", "longrope") if config.model_type == "phi3" else NEEDED
    partial = rope.get("partial_rotary_factor", 1.0)
    if rope.get("rope_type") not in types or (partial != 1.0 and config.model_type not in ("phi3", "glm4")):
        return True
    head_dim = int(head_dim * partial)
    if head_dim % 2:
        return True
    if any(isinstance(value, dict) for value in rope.values()):
        return True
    needed = [rope.get(key) for key in NEEDED[rope["rope_type"]]]
    if config.model_type == "ministral3":
        needed += [rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")]
    if rope["rope_type"] == "longrope":
        factors = [rope.get("short_factor"), rope.get("long_factor")]
        if any(not isinstance(each, list) or len(each) != head_dim // 2 for each in factors):
            return True
    if rope["rope_type"] in ("yarn", "longrope") and rope.get("factor") is not None:
        needed.append(rope["factor"])
    return any(not isinstance(number, int | float) or number <= 0 for number in needed)


def _aliased(key: str, values: Values) -> bool:
    aliases = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    return key in aliases and aliases[key] in values


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_a_table_is_drawn(family: str) -> None:
    table = FAMILIES[family]
    keys = [*table.keys.values(), *table.window.values(), *table.no_rope.values()]
    named = {name for key in keys for name in (key.name, key.also) if name is not None}
    assert named | table.only.keys() | table.equal.keys() <= {*SIZES[family], *OPTIONAL[family]}


def test_every_field_is_compared() -> None:
    """Those without a key of config.json show in the tensors' names and the logits."""
    fixed = {"prefix", "tensors", "ignored", "published_names", "positions", "position_offset", "conv1d", "gated"}
    fixed |= {"norm", "qk_norm", "zero_centered_norm", "rounds_embedding_multiplier"}
    compared = expected(AutoConfig.for_model("llama")).keys() - {"ffn", "windows", "ropes"} | {"activation"}
    assert {field.name for field in fields(Architecture)} - fixed == compared


# 300 cases a family take most of a minute for all of them.
@pytest.mark.parametrize("cases", [100, pytest.param(300, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_is_the_referee(family: str, cases: int) -> None:
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(deadline=None, max_examples=cases, suppress_health_check=health)
    @given(configs(family))
    def each(values: Values) -> None:
        referee(family, values)

    each()


def referee(family: str, values: Values) -> None:
    config = by_transformers(values)
    # Only these require hidden_size to be a multiple of the heads even where head_dim is given.
    whole = all(isinstance(values.get(key), int) and values.get(key) for key in LLAMA_SIZES)
    assume(not (family in ("llama", "gemma3_text") and whole and values["hidden_size"] % values["num_attention_heads"]))
    if config is None or has_no_table(values, config):
        with pytest.raises(UserError, match="^config.json: "):
            parse_architecture(values, "config.json")
    else:
        assert found_in(values) == expected(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_alone_mean_transformers_defaults(family: str) -> None:
    values = minimal_config(family)
    config = by_transformers(values)
    assert config is not None and found_in(values) == expected(config)


@pytest.mark.parametrize("name", BUILT_IN)
def test_published_shapes_are_configs_that_transformers_reads(name: str) -> None:
    values = built_in_config(name)
    config = by_transformers(values)
    assert config is not None and found_in(values) == expected(config)


@pytest.mark.parametrize("cases", [30, pytest.param(100, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_makes_a_traceback(family: str, cases: int) -> None:
    """Any JSON value, at any key that a table names, is read or refused with a UserError."""

    @settings(deadline=None, max_examples=cases)
    @given(data=st.data())
    @example(data=None)
    def each(data: Any) -> None:
        no_traceback(family, data)

    each()


def no_traceback(family: str, data: Any) -> None:
    table = FAMILIES[family]
    named = (*table.keys.values(), *table.window.values(), *table.no_rope.values())
    keys = [*(key.name for key in named), *table.only, *table.equal, *ROPE]
    keys += ["dtype", "torch_dtype", "model_type", "quantization_config", "per_layer_config"]
    values = minimal_config(family)
    if data is not None:
        anything = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        )
        values |= data.draw(st.dictionaries(st.sampled_from(keys), anything, max_size=3))
    try:
        parse_architecture(values, "config.json")
    except UserError as error:
        assert str(error).startswith("config.json: ")
    assert declared_dtype(values) in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, not '64'"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, not True"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be an integer from 1 to 10000, not 2.0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number of at least 0, not '1e-5'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, not 'no'"),
        ({"hidden_act": None}, "hidden_act must be text, not None"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, not 'linear'"),
        ({"layer_types": "full"}, "layer_types must be a list of texts, not 'full'"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 64 layers"),
        ({"model_type": 3}, "model_type must be text, not 3"),
        ({"hidden_size": 480}, "heads of 15, an odd size"),
    ],
)
def test_a_wrong_type_is_refused_by_its_key(values: Values, named: str) -> None:
    with pytest.raises(UserError) as error:
        parse_architecture(minimal_config("qwen2") | values, "config.json")
    assert named in str(error.value) and not isinstance(error.value, UnsupportedModel)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "mamba"},
        {"hidden_act": "quick_gelu"},
        {"quantization_config": {}},
        {"rope_scaling": {"type": "proportional"}},
    ],
)
def test_what_has_no_table_is_told_from_what_is_wrong(values: Values) -> None:
    with pytest.raises(UnsupportedModel):
        parse_architecture(minimal_config("llama") | values, "config.json")


def test_a_folder_and_its_file_are_the_same(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    assert read_architecture(folder) == read_architecture(folder / "config.json")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_dtype_is_that_of_the_files_and_without_them_the_config_s(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path, dtype=torch.bfloat16)
    assert stored_dtype(folder) == "bf16"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert find_model(str(folder)).dtype == "bf16"
    (folder / "model.safetensors").unlink()
    assert find_model(str(folder)).dtype == "fp32" and stored_dtype(folder) is None
    (folder / "model.safetensors").write_bytes(b"\x00" * 5)
    assert find_model(str(folder)).dtype == "fp32"


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"dtype": "float16"}, "bf16"),
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_declared_dtype(keys: Values, dtype: str) -> None:
    assert declared_dtype(keys) == dtype


def test_a_table_alone_makes_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model_type that is only in FAMILIES is read, its weights load, and it can be planned."""
    folder = make_tiny("llama", tmp_path / "cria")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "cria"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="model_type 'cria' is not supported"):
        read_architecture(folder)
    monkeypatch.setitem(families.FAMILIES, "cria", FAMILIES["llama"])
    architecture = read_architecture(folder)
    with open_checkpoint(folder) as checkpoint:
        check_checkpoint(architecture, checkpoint)
        held = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names())
    job = job_of(read_request(str(folder), ["lora.rank=2", "data.max_length=64"]), 1.0)
    assert (job.name, job.architecture.family, job.stored_dtype) == ("cria", "cria", "fp32")
    assert frozen_size(job.architecture) == held and job.placement.elements > 0


def test_a_mistral_with_kinds_of_layers_is_a_ministral(tmp_path: Path) -> None:
    """transformers decides so when it reads the file, whatever the value of the key."""
    for kinds in (["full_attention", "sliding_attention"], None):
        values = minimal_config("mistral") | {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": kinds}
        (tmp_path / "config.json").write_text(json.dumps(values))
        if kinds is not None:
            assert AutoConfig.from_pretrained(tmp_path).model_type == "ministral"
        with pytest.raises(UnsupportedModel, match="layer_types"):
            read_architecture(tmp_path)


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
_LONGROPE = _YARN | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("stated", "key", "value"),
    [
        (_LONGROPE, "original_max_position_embeddings", 1),
        (_LONGROPE, "original_max_position_embeddings", 0.5),
        (_LONGROPE, "attention_factor", 1e308),
        (_LONGROPE, "factor", 10**300),
        (_YARN, "rope_theta", 1.0),
        (_YARN, "beta_fast", 1e308),
        (_YARN, "beta_slow", 1e-320),
        (_YARN, "mscale", 1e308),
        (_YARN, "factor", 1e-320),
        ({"rope_theta": 10**300}, "rope_theta", 10**300),
        ({"rope_theta": 1e-308}, "rope_theta", 1e-308),
    ],
)
def test_rotary_numbers_that_give_no_finite_angles_are_refused(stated: Values, key: str, value: float) -> None:
    """They are finite floats, but dividing by them or their logarithm, or converting them, raised other errors."""
    values = minimal_config("llama") | {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    parse_architecture(values | {"rope_parameters": stated if len(stated) > 1 else {}}, "config.json")  # control
    with pytest.raises(UserError, match=key) as error:
        parse_architecture(values | {"rope_parameters": stated | {key: value}}, "config.json")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("value", [10**400, 2**31, -(10**400), 10**30])
@pytest.mark.parametrize(
    "key",
    ["rope_theta", "rms_norm_eps", "num_hidden_layers", "hidden_size", "max_window_layers", "num_attention_heads"],
)
def test_numbers_that_no_model_has_are_refused_at_once(key: str, value: int) -> None:
    values = minimal_config("qwen2") | {key: value}
    if (key == "rope_theta" and value == 2**31) or (key == "rms_norm_eps" and 0 < value < 10**400):
        parse_architecture(values, "config.json")
    else:
        with pytest.raises(UserError, match=key):
            parse_architecture(values, "config.json")


def test_a_name_on_the_hub_is_told_with_its_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "meta-llama/Llama-3.1-8B"
    download = f"not downloaded by itself; run `hf download {name} --local-dir {name}` first"
    for read in (read_architecture, load_tokenizer, read_adapter):
        with pytest.raises(UserError, match=download):
            read(Path(name))
    # Controls: a path whose parent exists, and a path that is no repository name of the Hub.
    (tmp_path / "models").mkdir()
    for path in ("models/llama", str(tmp_path / "llama"), "llama", "a/b/c"):
        with pytest.raises(UserError, match="no such folder; give a local Hugging Face model folder"):
            read_architecture(Path(path))
        assert hub_hint(Path(path)) == ""


@pytest.mark.parametrize(
    ("base", "named"), [("meta-llama/x", "an adapter of meta-llama/x, not"), (3, "an adapter, not")]
)
def test_an_adapter_is_no_model_folder(tmp_path: Path, base: object, named: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(UserError, match=f": {named} a model; give the folder of its base model"):
        read_architecture(tmp_path)
