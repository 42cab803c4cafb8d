"""One declarative table per family: its keys in config.json and all its tensor names, for loading and for export.

The tables follow transformers' `configuration_<family>.py` (defaults of missing keys) and `modeling_<family>.py`.
`config_json.parse_architecture` reads them. To add a family whose blocks Megatron can express, add a table here and a
tiny model to tests/tiny_models.py (docs/how-to/add-a-family.md has all steps).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank_dist.arch.architecture import KEY_NORM, QUERY_NORM, TensorRule
from lowrank_dist.arch.keys import Key
from lowrank_dist.arch.rope import RopeTable


@dataclass(frozen=True)
class Family:
    """The map from one `model_type` of config.json onto Megatron.

    model_class: transformers' class of the causal model. llama.cpp and vLLM look for it in `architectures`.
    prefix: see `Architecture`.
    keys: field of `Architecture`, or "ffn" → key of config.json; "layers" is the number of layers. Defaults of fields
    that are None or missing: ffn = 4 × hidden, kv_heads = heads, head_dim = hidden / heads.
    fixed: fields that every model of the family shares. derived: field → its value, from the fields that were read.
    only: key of config.json → the one supported value (also the default), and the feature that another value means. The
    key holds a flag, or a number if the supported value is None.
    equal: size of config.json → the field that it must equal if given, and the feature that another value means.
    absent: key that config.json must not have → the feature that it means.
    linears: Megatron linear → Hugging Face module paths: one per projection, in the order of LinearLayout.parts, or a
    single one for a module that stacks q, k and v (or gate and up) in that order.
    tensors: every other tensor; names of a layer's tensors have a `{layer}` field. `OUTPUT_LAYER` is left out where the
    embeddings are tied.
    ignored: patterns for names, without `prefix`, of tensors in the files that are no weights.
    window: the keys of a sliding window; empty where the family has none. "window" is its width, "used" a flag that
    turns it on, "kinds" a list with each layer's kind. In a family without a "kinds" key, all layers have the window.
    If config.json leaves "kinds" out, the family's other keys decide: with "interval", each interval-th layer has full
    attention, the others the window; with "first", the layers from that one on have the window; with neither, the
    layers without rotary positions have it. full_every: the interval of a family whose config.json has no key for it.
    no_rope: the keys of layers without rotary positions; empty where the family has none. "flags" has 0 for each such
    layer, else 1. Where it is missing, every "interval"-th layer is one.
    rope: what the family's rotary positions have in common.
    """

    model_class: str
    prefix: str
    keys: Mapping[str, Key]
    fixed: Mapping[str, Any]
    linears: Mapping[str, tuple[str, ...]]
    tensors: tuple[TensorRule, ...]
    only: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    window: Mapping[str, Key] = field(default_factory=dict)
    full_every: int | None = None
    no_rope: Mapping[str, Key] = field(default_factory=dict)
    equal: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    rope: RopeTable = RopeTable()
    absent: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)


def _weight_and_bias(megatron: str, hf: str, shape: tuple[str, ...] = ("hidden",)) -> tuple[TensorRule, TensorRule]:
    return (
        TensorRule(f"{megatron}.weight", f"{hf}.weight", shape),
        TensorRule(f"{megatron}.bias", f"{hf}.bias", shape),
    )


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _layer_norm(megatron: str, hf: str) -> TensorRule:
    """Return the rule of an RMSNorm of a Llama-like layer, from the names of its modules."""
    return TensorRule(f"decoder.layers.{{layer}}.{megatron}.weight", f"model.layers.{{layer}}.{hf}.weight", ("hidden",))


OUTPUT_LAYER = TensorRule("output_layer.weight", "lm_head.weight", ("vocab", "hidden"), "vocab")

_LLAMA_KEYS = {
    "hidden": Key("hidden_size", "size"),
    "layers": Key("num_hidden_layers", "depth"),
    "heads": Key("num_attention_heads", "heads"),
    "kv_heads": Key("num_key_value_heads", "heads", None),
    "head_dim": Key("head_dim", "even", None),
    "ffn": Key("intermediate_size", "size"),
    "vocab": Key("vocab_size", "size"),
    "max_positions": Key("max_position_embeddings", "size", 2048),
    "norm_eps": Key("rms_norm_eps", "number", 1e-6),
    "activation": Key("hidden_act", "text", "silu"),
    "tied": Key("tie_word_embeddings", "flag", False),
}
_MISTRAL_KEYS = _LLAMA_KEYS | {
    "kv_heads": Key("num_key_value_heads", "heads", 8),
    "max_positions": Key("max_position_embeddings", "size", 131_072),
}
_GRANITE_KEYS = _LLAMA_KEYS | {
    "embedding_multiplier": Key("embedding_multiplier", "positive", 1.0),
    # Default 1.0: without the key scores are not scaled, not even by 1/√head_dim.
    "attention_multiplier": Key("attention_multiplier", "positive", 1.0),
    "residual_multiplier": Key("residual_multiplier", "positive", 1.0),
    "logits_divisor": Key("logits_scaling", "positive", 1.0),
}
_QWEN_KEYS = _LLAMA_KEYS | {
    "kv_heads": Key("num_key_value_heads", "heads", 32, null=True),
    "max_positions": Key("max_position_embeddings", "size", 32_768),
}
_WINDOW = Key("sliding_window", "size", 4096, null=True)
_QWEN_WINDOW = {
    "window": _WINDOW,
    "used": Key("use_sliding_window", "flag", False),
    "first": Key("max_window_layers", "integer", 28),
    "kinds": Key("layer_types", "names", None),
}
_LLAMA_FIXED = {
    "norm": "RMSNorm",
    "gated": True,
    "qkv_bias": False,
    "proj_bias": False,
    "mlp_bias": False,
    "positions": "rope",
    "position_offset": 0,
    "qk_norm": False,
    "conv1d": False,
}
_LLAMA_LINEARS = {
    "linear_qkv": (
        "model.layers.{layer}.self_attn.q_proj",
        "model.layers.{layer}.self_attn.k_proj",
        "model.layers.{layer}.self_attn.v_proj",
    ),
    "linear_proj": ("model.layers.{layer}.self_attn.o_proj",),
    "linear_fc1": ("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"),
    "linear_fc2": ("model.layers.{layer}.mlp.down_proj",),
}
_LLAMA_TENSORS = (
    TensorRule("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden"), "vocab"),
    _layer_norm("input_layernorm", "input_layernorm"),
    _layer_norm("pre_mlp_layernorm", "post_attention_layernorm"),
    TensorRule("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    OUTPUT_LAYER,
)
_QK_NORM_TENSORS = (
    TensorRule(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        "model.layers.{layer}.self_attn.q_norm.weight",
        ("head_dim",),
    ),
    TensorRule(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        "model.layers.{layer}.self_attn.k_norm.weight",
        ("head_dim",),
    ),
)
_ATTENTION_BIASES = {
    "qkv_bias": Key("attention_bias", "flag", False),
    "proj_bias": Key("attention_bias", "flag", False),
}
_ALL_BIASES = {**_ATTENTION_BIASES, "mlp_bias": Key("mlp_bias", "flag", False)}
# OLMo 2: norms on the outputs of attention and MLP, and over all heads of queries and of keys.
_POST_NORM_TENSORS = (
    _layer_norm("post_self_attn_layernorm", "post_attention_layernorm"),
    _layer_norm("post_mlp_layernorm", "post_feedforward_layernorm"),
)
_HEADS_NORM_TENSORS = (
    TensorRule(
        f"decoder.layers.{{layer}}.{QUERY_NORM}.weight",
        "model.layers.{layer}.self_attn.q_norm.weight",
        ("queries",),
        "heads",
    ),
    TensorRule(
        f"decoder.layers.{{layer}}.{KEY_NORM}.weight",
        "model.layers.{layer}.self_attn.k_norm.weight",
        ("keys",),
        "kv_heads",
    ),
)
# Tensors of a Llama outside the layers.
_EMBEDDING, _INPUT_NORM, _, _FINAL_NORM, _ = _LLAMA_TENSORS
# Old checkpoints hold the rotary frequencies as a buffer. transformers ignores it too.
_ROPE_BUFFERS = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        model_class="LlamaForCausalLM",
        prefix="model.",
        keys=_LLAMA_KEYS | _ALL_BIASES,
        fixed=_without(_LLAMA_FIXED, *_ALL_BIASES),
        linears=_LLAMA_LINEARS,
        tensors=_LLAMA_TENSORS,
        ignored=_ROPE_BUFFERS,
    ),
    "granite": Family(
        model_class="GraniteForCausalLM",
        prefix="model.",
        keys=_GRANITE_KEYS | _ALL_BIASES,
        fixed=_without(_LLAMA_FIXED, *_ALL_BIASES),
        linears=_LLAMA_LINEARS,
        tensors=_LLAMA_TENSORS,
        ignored=_ROPE_BUFFERS,
    ),
    "mistral": Family(
        model_class="MistralForCausalLM",
        prefix="model.",
        keys=_MISTRAL_KEYS,
        fixed=_LLAMA_FIXED,
        linears=_LLAMA_LINEARS,
        tensors=_LLAMA_TENSORS,
        ignored=_ROPE_BUFFERS,
        window={"window": _WINDOW},
        absent={"layer_types": "transformers loads it as a ministral, whose layers differ from each other"},
    ),
    "qwen2": Family(
        model_class="Qwen2ForCausalLM",
        prefix="model.",
        keys=_QWEN_KEYS,
        fixed={**_LLAMA_FIXED, "qkv_bias": True},
        linears=_LLAMA_LINEARS,
        tensors=_LLAMA_TENSORS,
        ignored=_ROPE_BUFFERS,
        window=_QWEN_WINDOW,
    ),
    "qwen3": Family(
        model_class="Qwen3ForCausalLM",
        prefix="model.",
        keys=_QWEN_KEYS | {"head_dim": Key("head_dim", "even", 128)} | _ATTENTION_BIASES,
        fixed=_without(_LLAMA_FIXED, *_ATTENTION_BIASES) | {"qk_norm": True},
        linears=_LLAMA_LINEARS,
        tensors=_LLAMA_TENSORS + _QK_NORM_TENSORS,
        ignored=_ROPE_BUFFERS,
        window=_QWEN_WINDOW,
    ),
    "gpt2": Family(
        model_class="GPT2LMHeadModel",
        prefix="transformer.",
        keys={
            "hidden": Key("n_embd", "size", also="hidden_size"),
            "layers": Key("n_layer", "depth", also="num_hidden_layers"),
            "heads": Key("n_head", "heads", also="num_attention_heads"),
            "ffn": Key("n_inner", "size", None),
            "vocab": Key("vocab_size", "size"),
            "max_positions": Key("n_positions", "size", 1024, also="max_position_embeddings"),
            "norm_eps": Key("layer_norm_epsilon", "number", 1e-5),
            "activation": Key("activation_function", "text", "gelu_new"),
            "tied": Key("tie_word_embeddings", "flag", True),
        },
        fixed={
            "norm": "LayerNorm",
            "gated": False,
            "qkv_bias": True,
            "proj_bias": True,
            "mlp_bias": True,
            "positions": "learned",
            "position_offset": 0,
            "qk_norm": False,
            "conv1d": True,
        },
        only={
            "scale_attn_weights": (True, "attention scores without the 1/√head_dim scale"),
            "scale_attn_by_inverse_layer_idx": (False, "attention scores divided by the layer number"),
            "add_cross_attention": (False, "cross-attention"),
        },
        linears={
            "linear_qkv": ("transformer.h.{layer}.attn.c_attn",),
            "linear_proj": ("transformer.h.{layer}.attn.c_proj",),
            "linear_fc1": ("transformer.h.{layer}.mlp.c_fc",),
            "linear_fc2": ("transformer.h.{layer}.mlp.c_proj",),
        },
        tensors=(
            TensorRule("embedding.word_embeddings.weight", "transformer.wte.weight", ("vocab", "hidden"), "vocab"),
            TensorRule("embedding.position_embeddings.weight", "transformer.wpe.weight", ("positions", "hidden")),
            *_weight_and_bias("decoder.layers.{layer}.input_layernorm", "transformer.h.{layer}.ln_1"),
            *_weight_and_bias("decoder.layers.{layer}.pre_mlp_layernorm", "transformer.h.{layer}.ln_2"),
            *_weight_and_bias("decoder.final_layernorm", "transformer.ln_f"),
            OUTPUT_LAYER,
        ),
        # The causal mask and its fill value, which old versions of transformers saved as buffers.
        ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
    ),
    "opt": Family(
        model_class="OPTForCausalLM",
        prefix="model.",
        keys={
            "hidden": Key("hidden_size", "size"),
            "layers": Key("num_hidden_layers", "depth"),
            "heads": Key("num_attention_heads", "heads"),
            "ffn": Key("ffn_dim", "size"),
            "vocab": Key("vocab_size", "size"),
            "max_positions": Key("max_position_embeddings", "size", 2048),
            "activation": Key("activation_function", "text", "relu"),
            "qkv_bias": Key("enable_bias", "flag", True),
            "proj_bias": Key("enable_bias", "flag", True),
            "mlp_bias": Key("enable_bias", "flag", True),
            "tied": Key("tie_word_embeddings", "flag", True),
        },
        fixed={
            "norm": "LayerNorm",
            "norm_eps": 1e-5,
            "gated": False,
            "positions": "learned",
            "position_offset": 2,
            "qk_norm": False,
            "conv1d": False,
        },
        only={
            "do_layer_norm_before": (True, "layer norms after the residual addition, as in opt-350m"),
            "layer_norm_elementwise_affine": (True, "layer norms without weights"),
            "_remove_final_layer_norm": (False, "no final layer norm"),
        },
        equal={
            "word_embed_proj_dim": ("hidden", "a projection between embedding and decoder, as in opt-350m"),
        },
        linears={
            "linear_qkv": (
                "model.decoder.layers.{layer}.self_attn.q_proj",
                "model.decoder.layers.{layer}.self_attn.k_proj",
                "model.decoder.layers.{layer}.self_attn.v_proj",
            ),
            "linear_proj": ("model.decoder.layers.{layer}.self_attn.out_proj",),
            "linear_fc1": ("model.decoder.layers.{layer}.fc1",),
            "linear_fc2": ("model.decoder.layers.{layer}.fc2",),
        },
        tensors=(
            TensorRule(
                "embedding.word_embeddings.weight", "model.decoder.embed_tokens.weight", ("vocab", "hidden"), "vocab"
            ),
            TensorRule(
                "embedding.position_embeddings.weight",
                "model.decoder.embed_positions.weight",
                ("positions", "hidden"),
                row_offset=2,
            ),
            *_weight_and_bias(
                "decoder.layers.{layer}.input_layernorm", "model.decoder.layers.{layer}.self_attn_layer_norm"
            ),
            *_weight_and_bias(
                "decoder.layers.{layer}.pre_mlp_layernorm", "model.decoder.layers.{layer}.final_layer_norm"
            ),
            *_weight_and_bias("decoder.final_layernorm", "model.decoder.final_layer_norm"),
            OUTPUT_LAYER,
        ),
    ),
    "smollm3": Family(
        model_class="SmolLM3ForCausalLM",
        prefix="model.",
        keys=_LLAMA_KEYS
        | {
            "kv_heads": Key("num_key_value_heads", "heads", 4, null=True),
            "max_positions": Key("max_position_embeddings", "size", 32_768),
            "tied": Key("tie_word_embeddings", "flag", True),
        }
        | _ALL_BIASES,
        fixed=_without(_LLAMA_FIXED, *_ALL_BIASES),
        linears=_LLAMA_LINEARS,
        tensors=_LLAMA_TENSORS,
        ignored=_ROPE_BUFFERS,
        window={
            "window": Key("sliding_window", "size", None),
            "used": Key("use_sliding_window", "flag", False),
            "kinds": Key("layer_types", "names", None),
        },
        no_rope={
            "flags": Key("no_rope_layers", "bits", None),
            "interval": Key("no_rope_layer_interval", "size", 4),
        },
        rope=RopeTable(theta=2_000_000.0),
    ),
    "ministral3": Family(
        model_class="Ministral3ForCausalLM",
        prefix="model.",
        keys=_LLAMA_KEYS
        | {
            "kv_heads": Key("num_key_value_heads", "heads", 8),
            "head_dim": Key("head_dim", "even", 128),
            "max_positions": Key("max_position_embeddings", "size", 262_144),
            "norm_eps": Key("rms_norm_eps", "number", 1e-5),
        },
        fixed=_LLAMA_FIXED,
        linears=_LLAMA_LINEARS,
        tensors=_LLAMA_TENSORS,
        ignored=_ROPE_BUFFERS,
        window={"window": Key("sliding_window", "size", None)},
        rope=RopeTable(
            scales_queries=True,
            default={
                "type": "yarn",
                "rope_theta": 1_000_000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16_384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        ),
    ),
    "phi3": Family(
        model_class="Phi3ForCausalLM",
        prefix="model.",
        # Phi3Config has no head_dim, and yet the modelling code reads it.
        keys=_LLAMA_KEYS
        | {
            "kv_heads": Key("num_key_value_heads", "heads", None),
            "max_positions": Key("max_position_embeddings", "size", 4096),
            "norm_eps": Key("rms_norm_eps", "number", 1e-5),
        },
        fixed=_LLAMA_FIXED,
        linears=_LLAMA_LINEARS
        | {
            "linear_qkv": ("model.layers.{layer}.self_attn.qkv_proj",),
            "linear_fc1": ("model.layers.{layer}.mlp.gate_up_proj",),
        },
        tensors=_LLAMA_TENSORS,
        ignored=_ROPE_BUFFERS,
        window={"window": Key("sliding_window", "size", None)},
        rope=RopeTable(
            types=("default", "longrope"), renamed={"su": "longrope", "yarn": "longrope"}, rotated=1.0, original=4096
        ),
    ),
    "seed_oss": Family(
        model_class="SeedOssForCausalLM",
        prefix="model.",
        keys=_LLAMA_KEYS
        | {
            "kv_heads": Key("num_key_value_heads", "heads", 8, null=True),
            "head_dim": Key("head_dim", "even", 128, null=True),
            "max_positions": Key("max_position_embeddings", "size", 524_288),
            "qkv_bias": Key("attention_bias", "flag", True),
            "proj_bias": Key("attention_out_bias", "flag", False),
            "mlp_bias": Key("mlp_bias", "flag", False),
        },
        fixed=_without(_LLAMA_FIXED, *_ALL_BIASES),
        linears=_LLAMA_LINEARS,
        tensors=_LLAMA_TENSORS,
        ignored=_ROPE_BUFFERS,
    ),
    "olmo2": Family(
        model_class="Olmo2ForCausalLM",
        prefix="model.",
        keys=_LLAMA_KEYS | {"norm_eps": Key("rms_norm_eps", "number", 1e-5)} | _ATTENTION_BIASES,
        fixed=_without(_LLAMA_FIXED, *_ATTENTION_BIASES),
        linears=_LLAMA_LINEARS,
        tensors=(_EMBEDDING, *_POST_NORM_TENSORS, *_HEADS_NORM_TENSORS, _FINAL_NORM, OUTPUT_LAYER),
        ignored=_ROPE_BUFFERS,
    ),
    "gemma3_text": Family(
        model_class="Gemma3ForCausalLM",
        prefix="model.",
        keys=_LLAMA_KEYS
        | {
            "kv_heads": Key("num_key_value_heads", "heads", 4),
            "head_dim": Key("head_dim", "even", 256),
            "max_positions": Key("max_position_embeddings", "size", 131_072),
            "activation": Key("hidden_activation", "text", "gelu_pytorch_tanh"),
            "tied": Key("tie_word_embeddings", "flag", True),
            "attention_multiplier": Key("query_pre_attn_scalar", "size", 256),
        }
        | _ATTENTION_BIASES,
        fixed=_without(_LLAMA_FIXED, *_ATTENTION_BIASES)
        | {"qk_norm": True, "zero_centered_norm": True, "rounds_embedding_multiplier": True},
        derived={
            "embedding_multiplier": lambda fields: fields["hidden"] ** 0.5,
            "attention_multiplier": lambda fields: fields["attention_multiplier"] ** -0.5,
        },
        only={
            "attn_logit_softcapping": (None, "soft limits on attention scores"),
            "final_logit_softcapping": (None, "soft limits on logits"),
            "use_bidirectional_attention": (False, "attention to later positions"),
        },
        linears=_LLAMA_LINEARS,
        tensors=(
            _EMBEDDING,
            _INPUT_NORM,
            _layer_norm("pre_mlp_layernorm", "pre_feedforward_layernorm"),
            *_POST_NORM_TENSORS,
            *_QK_NORM_TENSORS,
            _FINAL_NORM,
            OUTPUT_LAYER,
        ),
        window={
            "window": Key("sliding_window", "size", 4096),
            "kinds": Key("layer_types", "names", None),
            "interval": Key("sliding_window_pattern", "size", 6),
        },
        rope=RopeTable(theta=1_000_000.0, local=("rope_local_base_freq", 10_000.0)),
    ),
    "olmo3": Family(
        model_class="Olmo3ForCausalLM",
        prefix="model.",
        keys=_LLAMA_KEYS | {"norm_eps": Key("rms_norm_eps", "number", 1e-5)} | _ATTENTION_BIASES,
        fixed=_without(_LLAMA_FIXED, *_ATTENTION_BIASES),
        linears=_LLAMA_LINEARS,
        tensors=(_EMBEDDING, *_POST_NORM_TENSORS, *_HEADS_NORM_TENSORS, _FINAL_NORM, OUTPUT_LAYER),
        ignored=_ROPE_BUFFERS,
        window={"window": Key("sliding_window", "size", 4096), "kinds": Key("layer_types", "names", None)},
        full_every=4,
        # transformers passes rope_theta of an older config.json to the layers with full attention alone.
        rope=RopeTable(theta=500_000.0, local=(None, 500_000.0)),
    ),
    "glm4": Family(
        model_class="Glm4ForCausalLM",
        prefix="model.",
        keys=_LLAMA_KEYS
        | {
            "kv_heads": Key("num_key_value_heads", "heads", 2),
            "head_dim": Key("head_dim", "even", 128),
            "max_positions": Key("max_position_embeddings", "size", 131_072),
            "norm_eps": Key("rms_norm_eps", "number", 0.00000015625),
            "qkv_bias": Key("attention_bias", "flag", True),
        },
        fixed=_without(_LLAMA_FIXED, "qkv_bias"),
        linears=_LLAMA_LINEARS | {"linear_fc1": ("model.layers.{layer}.mlp.gate_up_proj",)},
        tensors=(
            *_LLAMA_TENSORS,
            _layer_norm("post_self_attn_layernorm", "post_self_attn_layernorm"),
            _layer_norm("post_mlp_layernorm", "post_mlp_layernorm"),
        ),
        ignored=_ROPE_BUFFERS,
        rope=RopeTable(rotated=0.5, interleaved=True),
    ),
}
