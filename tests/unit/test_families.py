"""Tables against transformers: the meaning of config.json, every tensor's name and shape, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import (
    AutoConfig,
    LlamaConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lowrank_dist.arch.architecture import Architecture, padded_vocab
from lowrank_dist.arch.config_json import parse_architecture, read_architecture
from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.arch.rope import RopeParameters
from lowrank_dist.arch.tensors import copy_plans, hf_shapes, parameter_shapes
from lowrank_dist.errors import UserError
from lowrank_dist.model.rope import inv_freq
from tests.tiny_models import FAMILY_NAMES, make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_tiny(name, tmp_path_factory.mktemp(name)) for name in FAMILY_NAMES}


def edited(tiny: Path, tmp_path: Path, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write a folder that holds only `tiny`'s config.json, with changes."""
    config = json.loads((tiny / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


MIXED = ("smollm3", "gemma3_text", "olmo3")  # the layers of these tiny models are not all alike
EXPECTED = {
    "phi3": {"max_positions": 64, "norm_eps": 1e-5, "head_dim": 16, "qkv_bias": False},
    "seed_oss": {"head_dim": 24, "qkv_bias": True, "proj_bias": True, "mlp_bias": True},
    "smollm3": {"tied": True, "windows": {None}, "ropes": (RopeParameters(2e6),)},
    "ministral3": {"head_dim": 24, "tied": False, "windows": {None}},
    "llama": {"norm": "RMSNorm", "activation": "silu", "gated": True, "kv_heads": 2, "head_dim": 16, "tied": False},
    "llama2": {"family": "llama", "kv_heads": 4, "ropes": (RopeParameters(10000.0),), "norm_eps": 1e-6},
    "granite": {
        "embedding_multiplier": 5.0,
        "attention_multiplier": 0.06,
        "residual_multiplier": 0.4,
        "logits_divisor": 3.0,
        "kv_heads": 2,
    },
    "mistral": {"windows": {64}, "qkv_bias": False, "max_positions": 64},
    "qwen2": {"qkv_bias": True, "proj_bias": False, "mlp_bias": False, "tied": True, "windows": {None}},
    "qwen3": {"qk_norm": True, "qkv_bias": False, "head_dim": 24, "hidden": 64},
    "gpt2": {
        "norm": "LayerNorm",
        "activation": "gelu_tanh",
        "gated": False,
        "mlp_bias": True,
        "conv1d": True,
        "positions": "learned",
        "ropes": (),
        "tied": True,
        "prefix": "transformer.",
    },
    "opt": {"activation": "relu", "position_offset": 2, "mlp_bias": True, "norm_eps": 1e-5, "positions": "learned"},
    "olmo3": {"norm_eps": 1e-5, "windows": {None, 64}, "tied": False, "head_dim": 16},
    "glm4": {
        "qkv_bias": True,
        "proj_bias": False,
        "head_dim": 24,
        "ropes": (RopeParameters(1e4, columns=12, interleaved=True),),
    },
    "olmo2": {"norm_eps": 1e-5, "qk_norm": False, "zero_centered_norm": False, "kv_heads": 2, "tied": False},
    "gemma3_text": {
        "zero_centered_norm": True,
        "qk_norm": True,
        "activation": "gelu_tanh",
        "gated": True,
        "embedding_multiplier": 8.0,
        "rounds_embedding_multiplier": True,
        "attention_multiplier": 40**-0.5,
        "windows": {None, 64},
        "ropes": (RopeParameters(1e2), RopeParameters(1e4, "linear", 4.0)),
        "head_dim": 24,
        "tied": True,
    },
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_config_means_what_transformers_means(family: str, tiny: dict[str, Path]) -> None:
    architecture = read_architecture(tiny[family])
    assert EXPECTED[family]
    windows = {"windows": {kind.sliding_window for kind in architecture.kinds}}
    found = {field: windows.get(field, getattr(architecture, field, None)) for field in EXPECTED[family]}
    assert found == EXPECTED[family]
    assert (architecture.hidden, len(architecture.layers), architecture.heads, architecture.vocab) == (64, 2, 4, 107)
    assert len(architecture.kinds) == (2 if family in MIXED else 1)
    assert {kind.ffn for kind in architecture.kinds} == {96}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("tied", [False, True])
def test_tables_name_every_tensor_that_transformers_writes(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path, tie_word_embeddings=tied)
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        written = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
    architecture = read_architecture(folder)
    assert hf_shapes(architecture) == written
    assert ("output_layer.weight" in parameter_shapes(architecture, 1, 1)) == (not tied)


def test_opt_without_biases(tmp_path: Path) -> None:
    folder = make_tiny("opt", tmp_path, enable_bias=False)
    architecture = read_architecture(folder)
    assert not architecture.mlp_bias and not architecture.layers[0].linears["linear_qkv"].bias
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        assert set(hf_shapes(architecture)) == set(handle.keys())


def test_parameter_shapes_of_llama(tiny: dict[str, Path]) -> None:
    shapes = parameter_shapes(read_architecture(tiny["llama"]), tp_size=2, vocab_multiple=8)
    layer = "decoder.layers.1"
    assert shapes["embedding.word_embeddings.weight"] == shapes["output_layer.weight"] == (56, 64)
    assert shapes[f"{layer}.self_attention.linear_qkv.weight"] == (64, 64)
    assert shapes[f"{layer}.self_attention.linear_proj.weight"] == (64, 32)
    assert shapes[f"{layer}.mlp.linear_fc1.weight"] == (96, 64)
    assert shapes[f"{layer}.mlp.linear_fc2.weight"] == (64, 48)
    assert shapes[f"{layer}.pre_mlp_layernorm.weight"] == shapes["decoder.final_layernorm.weight"] == (64,)
    assert len(shapes) == 3 + 2 * 6


def test_projection_names(tiny: dict[str, Path]) -> None:
    names = {
        family: [x.name for linear in read_architecture(tiny[family]).layers[0].linears.values() for x in linear.parts]
        for family in ("llama", "gpt2", "opt")
    }
    assert names == {
        "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "gpt2": ["q_proj", "k_proj", "v_proj", "c_proj", "c_fc", "c_proj"],
        "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    }
    fused = read_architecture(tiny["gpt2"]).layers[0].linears["linear_qkv"]
    assert fused.whole == "c_attn" and [part.offset for part in fused.parts] == [0, 64, 128]
    assert {part.path for part in fused.parts} == {"transformer.h.{layer}.attn.c_attn"}


ROPES = [
    {"rope_type": "default", "rope_theta": 1e5},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_inv_freq_is_transformers_to_the_bit(rope: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=4096, rope_parameters=dict(rope))
    if rope["rope_type"] == "default":
        expected, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    (found,) = parse_architecture(config.to_dict(), "config.json").ropes
    assert inv_freq(found, head_dim).dtype == torch.float32
    assert torch.equal(inv_freq(found, head_dim), expected)
    assert not torch.equal(inv_freq(RopeParameters(rope["rope_theta"] + 1), head_dim), expected)
    if rope["rope_type"] != "default":
        assert not torch.equal(inv_freq(RopeParameters(rope["rope_theta"]), head_dim), expected)


def test_rope_of_older_config_files(tiny: dict[str, Path], tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    older = edited(tiny["llama"], tmp_path, drop=("rope_parameters",), rope_theta=2e4, rope_scaling=scaling)
    assert read_architecture(older).ropes == (RopeParameters(2e4, "linear", 2.0),)
    plain = edited(tiny["llama"], tmp_path, drop=("rope_parameters",), rope_theta=2e4)
    assert read_architecture(plain).ropes == (RopeParameters(2e4),)


REFUSED = [
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types is not supported in a mistral"),
    ("granite", {"logits_scaling": 0}, "logits_scaling"),
    ("granite", {"attention_multiplier": None}, "attention_multiplier"),
    ("llama", {"hidden_act": "quick_gelu"}, "hidden_act"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("llama", {"head_dim": 15}, "head_dim"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}}, "proportional"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}}, "factor"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}}, "low_freq_factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "mrope_section"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}}, "beta_fast"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 3}}, "short_factor"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
    ("ministral3", {"rope_parameters": {"rope_type": "default"}}, "llama_4_scaling_beta"),
    ("llama", {"hidden_size": "wide"}, "hidden_size"),
    ("llama", {"model_type": "mixtral"}, "model_type 'mixtral'"),
    ("llama", {"model_type": "my_own"}, "model_type 'my_own'"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types ['chunked_attention']"),
    *(
        (
            family,
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": window, "use_sliding_window": used},
            "layer_types has sliding_attention",
        )
        for family, window, used in (("smollm3", 8, False), ("smollm3", None, True), ("qwen2", 8, False))
    ),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"n_head": 5}, "n_head"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    ("opt", {"activation_function": "tanh"}, "activation_function"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("gemma3_text", {"hidden_activation": "quick_gelu"}, "hidden_activation"),
    ("gemma3_text", {"rope_parameters": {"chunked_attention": {"rope_theta": 1e4}}}, "chunked_attention"),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED, ids=[f"{f}-{named}" for f, _, named in REFUSED])
def test_what_is_not_supported_is_refused_by_key(
    family: str, changes: dict[str, Any], named: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        read_architecture(edited(tiny[family], tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(error.value) and named in str(error.value)


def test_each_refusal_of_a_table_is_tried() -> None:
    tried = {(family, key) for family, changes, _ in REFUSED for key in changes}
    assert {(name, key) for name, of in FAMILIES.items() for key in (*of.only, *of.equal, *of.absent)} <= tried


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_an_unchanged_config_is_not_refused(family: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    assert read_architecture(edited(tiny[family], tmp_path)) == read_architecture(tiny[family])


def test_keys_of_phi3_that_its_config_class_does_not_name(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Its modelling code reads head_dim, and rope type "yarn" is the older name of longrope."""
    default = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    folder = make_tiny("phi3", tmp_path / "wide", head_dim=24, rope_parameters=default)
    architecture = read_architecture(folder)
    assert (architecture.head_dim, architecture.layers[0].rope.columns) == (24, 12)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert hf_shapes(architecture) == stored
    ropes = json.loads((tiny["phi3"] / "config.json").read_text())["rope_parameters"]
    renamed = edited(tiny["phi3"], tmp_path, rope_parameters=ropes | {"rope_type": "yarn"})
    assert read_architecture(renamed) == read_architecture(tiny["phi3"])


def test_every_layer_sliding_is_a_window(tiny: dict[str, Path], tmp_path: Path) -> None:
    changes = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 32, "layer_types": None}
    assert read_architecture(edited(tiny["qwen2"], tmp_path, **changes)).layers[0].sliding_window == 32
    assert read_architecture(edited(tiny["mistral"], tmp_path, sliding_window=None)).layers[0].sliding_window is None


def test_which_norms_a_layer_has_follows_from_its_tensors(tiny: dict[str, Path]) -> None:
    names = ("input_layernorm", "post_self_attn_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")
    found = {
        family: "".join("01"[read_architecture(tiny[family]).layers[0].has(name)] for name in names)
        for family in ("llama", "gpt2", "olmo2", "gemma3_text")
    }
    assert found == {"llama": "1010", "gpt2": "1010", "olmo2": "0101", "gemma3_text": "1111"}


@pytest.mark.parametrize(("tp_size", "keys"), [(1, 32), (2, 16), (4, 32)])
def test_norms_over_heads_are_cut_as_the_heads_are(tp_size: int, keys: int, tiny: dict[str, Path]) -> None:
    """Four query heads and two key/value heads of 16; ranks that share a key head hold the weights of all keys."""
    architecture = read_architecture(tiny["olmo2"])
    norm = "decoder.layers.1.self_attention.heads_norm"
    plans = [copy_plans(architecture, rank, tp_size, padded_vocab(107, 1, tp_size)) for rank in range(tp_size)]
    for rank, plan in enumerate(plans):
        (queries,) = plan[f"{norm}.query.weight"].copies
        assert queries.hf_index == (slice(rank * 64 // tp_size, (rank + 1) * 64 // tp_size),)
        (copy,) = plan[f"{norm}.key.weight"].copies
        first = 0 if keys == 32 else rank * 16
        assert copy.hf_index == (slice(first, first + keys),) and plan[f"{norm}.key.weight"].cut == (tp_size < 4)


def test_layers_of_a_gemma(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Every sixth layer sees all positions. In an older file rope_scaling is that of these layers alone."""
    older = {"rope_theta": 2e6, "rope_local_base_freq": 3e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    dropped = ("layer_types", "rope_parameters")
    folder = edited(tiny["gemma3_text"], tmp_path, drop=dropped, num_hidden_layers=7, sliding_window_pattern=3, **older)
    layers = read_architecture(folder).layers
    assert [kind.sliding_window for kind in layers] == [64, 64, None, 64, 64, None, 64]
    assert (layers[0].rope, layers[2].rope) == (RopeParameters(3e3), RopeParameters(2e6, "linear", 8.0))
    plain = read_architecture(edited(tiny["gemma3_text"], tmp_path, drop=dropped, num_hidden_layers=7)).layers
    assert [kind.sliding_window is None for kind in plain] == [False] * 5 + [True, False]
    assert (plain[0].rope, plain[5].rope) == (RopeParameters(1e4), RopeParameters(1e6))


def test_a_window_beside_full_attention_makes_two_kinds(tiny: dict[str, Path], tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 32}
    for kinds in (
        {"max_window_layers": 1, "layer_types": None},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ):
        found = read_architecture(edited(tiny["qwen2"], tmp_path, **window, **kinds))
        assert [kind.sliding_window for kind in found.layers] == [None, 32] and len(found.kinds) == 2


def test_gpt2_without_n_inner(tiny: dict[str, Path], tmp_path: Path) -> None:
    assert read_architecture(edited(tiny["gpt2"], tmp_path, n_inner=None)).layers[0].ffn == 256


@pytest.mark.parametrize(
    ("heads", "kv_heads", "legal"),
    [(4, 4, (1, 2, 4)), (4, 2, (1, 2, 4)), (4, 1, (1, 2, 4)), (8, 2, (1, 2, 4, 8)), (9, 3, (1, 3)), (6, 2, (1, 2))],
)
def test_tp_sizes(heads: int, kv_heads: int, legal: tuple[int, ...]) -> None:
    """ffn 96. With 9 heads, 9 ranks do not divide ffn. With 6 heads in 2 groups, 3 ranks share a group unevenly."""
    architecture = architecture_for(heads, kv_heads)
    assert architecture.legal_tp_sizes() == legal
    assert architecture.legal_tp_sizes(2) == tuple(size for size in legal if size <= 2)
    for size in range(1, heads + 2):
        if size in legal:
            architecture.check_tp(size)
            copy_plans(architecture, size - 1, size, padded_vocab(107, 8, size))
        else:
            with pytest.raises(UserError, match=f"parallel.tensor={size} .*use one of {', '.join(map(str, legal))}$"):
                architecture.check_tp(size)
    with pytest.raises(UserError, match=f"use one of {', '.join(str(size) for size in legal if size < 3)} on 2 ranks$"):
        architecture.check_tp(heads + 1, ranks=2)


def architecture_for(heads: int, kv_heads: int) -> Architecture:
    config = {
        "model_type": "llama",
        "hidden_size": 8 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "vocab_size": 107,
    }
    return parse_architecture(config, "config.json")


@settings(deadline=None)
@given(vocab=st.integers(1, 200_000), multiple=st.sampled_from([1, 8, 64, 128]), tp_size=st.integers(1, 16))
def test_padded_vocab(vocab: int, multiple: int, tp_size: int) -> None:
    padded = padded_vocab(vocab, multiple, tp_size)
    assert padded % (multiple * tp_size) == 0 and 0 <= padded - vocab < multiple * tp_size


def test_find_accepts_a_missing_prefix(tiny: dict[str, Path]) -> None:
    architecture = read_architecture(tiny["gpt2"])
    name = "transformer.h.0.ln_1.weight"
    assert architecture.find(name, {name, "h.0.ln_1.weight"}) == name
    assert architecture.find(name, {"h.0.ln_1.weight"}) == "h.0.ln_1.weight"
    assert architecture.find(name, {"h.1.ln_1.weight"}) is None


def test_every_family_is_tested(tiny: dict[str, Path]) -> None:
    assert {AutoConfig.from_pretrained(folder).model_type for folder in tiny.values()} == set(FAMILIES)
