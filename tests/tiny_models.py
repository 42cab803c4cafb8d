"""Tiny random models of each family, complete Hugging Face folders, for any test.

Written by transformers' own classes, so that the reader under test never reads what its own code wrote. Norm weights
are near 1 and biases near 0 but all differ, so a swapped or missing one changes the logits.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from lowrank_dist.arch.families import FAMILIES

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 107  # odd, so that every TP size pads
BOS, EOS, PAD, IM_START, IM_END = range(5)

_COMMON = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_SIZES = {
    **_COMMON,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": False}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 6,
    "beta_fast": 8.0,
    "mscale": 0.5,
    "mscale_all_dim": 1.5,
    "llama_4_scaling_beta": 0.3,
}

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.0, 4.0, 9.0],
}
_OLMO_ROPES = {
    "full_attention": {key: value for key, value in _YARN.items() if key != "llama_4_scaling_beta"},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
}
_GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
}

# All different, none 1, and that of attention far from 1/√head_dim = 0.25: a missing or exchanged one shows.
_MULTIPLIERS = {
    "embedding_multiplier": 5.0,
    "attention_multiplier": 0.06,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}

# Family → (config class, model class, keys of config.json).
_RECIPES: dict[str, tuple[type, type[PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {**_GROUPED, "head_dim": 16, "rope_parameters": _LLAMA3_ROPE}),
    "llama2": (LlamaConfig, LlamaForCausalLM, {**_GROUPED, "num_key_value_heads": 4}),
    "granite": (GraniteConfig, GraniteForCausalLM, {**_GROUPED, **_MULTIPLIERS}),
    "mistral": (MistralConfig, MistralForCausalLM, {**_GROUPED, "head_dim": 16, "sliding_window": 64}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {**_GROUPED, "tie_word_embeddings": True}),
    # heads × head_dim is not the hidden size, as in the published Qwen3 models.
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**_GROUPED, "head_dim": 24}),
    "gpt2": (
        GPT2Config,
        GPT2LMHeadModel,
        {**_COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 64},
    ),
    "opt": (OPTConfig, OPTForCausalLM, {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {**_GROUPED, "no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {**_GROUPED, "original_max_position_embeddings": 8, "rope_parameters": _LONGROPE, "pad_token_id": 2},
    ),
    "seed_oss": (
        SeedOssConfig,
        SeedOssForCausalLM,
        {**_GROUPED, "head_dim": 24, "attention_out_bias": True, "mlp_bias": True},
    ),
    "ministral3": (Ministral3Config, Ministral3ForCausalLM, {**_GROUPED, "head_dim": 24, "rope_parameters": _YARN}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, _GROUPED),
    "olmo3": (
        Olmo3Config,
        Olmo3ForCausalLM,
        {
            **_GROUPED,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "rope_parameters": _OLMO_ROPES,
        },
    ),
    "glm4": (Glm4Config, Glm4ForCausalLM, {**_GROUPED, "head_dim": 24, "pad_token_id": 2}),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            **_GROUPED,
            "head_dim": 24,
            "query_pre_attn_scalar": 40,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "rope_parameters": _GEMMA_ROPES,
            "tie_word_embeddings": True,
        },
    ),
}
FAMILY_NAMES = tuple(_RECIPES)
_GEMMA = (Gemma3ForCausalLM, Gemma3ForConditionalGeneration)


def make_tiny(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model of `family` (one of FAMILY_NAMES) with its tokenizer into `folder`, and return `folder`.

    `overrides` are keys of config.json ("num_key_value_heads", "n_head", "tie_word_embeddings", …), besides
    `dtype` (a torch dtype, fp32 by default) and `max_shard_size` (as save_pretrained's, for a sharded checkpoint).
    The same seed gives the same weights.
    """
    config_class, model_class, keys = _RECIPES[family]
    dtype = overrides.pop("dtype", torch.float32)
    max_shard_size = overrides.pop("max_shard_size", "5GB")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**{**keys, **overrides}))
        _randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    _write_tokenizer(folder)
    return folder


# model_type → (config class, model class, family of its text, keys of its vision_config, other keys of config.json).
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 16, "patch_size": 8}
_WITH_IMAGES: dict[str, tuple[type, type[PreTrainedModel], str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        "gemma3_text",
        {**_VISION, "model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4, "image_token_index": 100, "boi_token_index": 101, "eoi_token_index": 102},
    ),
    "mistral3": (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        "ministral3",
        {**_VISION, "model_type": "pixtral", "head_dim": 16},
        {"image_token_index": 100, "tie_word_embeddings": False},
    ),
}


def make_tiny_with_images(name: str, folder: Path) -> Path:
    """Write a random model of images and text (gemma3 or mistral3) with a tokenizer into `folder`, and return it.

    Its tensors have the names of published files.
    """
    config_class, model_class, family, vision, keys = _WITH_IMAGES[name]
    text_class, _, text = _RECIPES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(text_config=text_class(**text).to_dict(), vision_config=vision, **keys))
        _randomise(model)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def flipped_flags(folder: Path) -> dict[str, bool]:
    """Return each true or false key that the family's table reads, with the value that the model does not have."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = FAMILIES[values["model_type"]].keys.values()
    return {key.name: not values[key.name] for key in keys if key.kind == "flag"}


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2] if "." in name else name
        if name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
        elif "norm" in module or module.startswith("ln_"):
            # Gemma's norms multiply by 1 + weight.
            parameter.uniform_(0.7, 1.3)
            if isinstance(model, _GEMMA):
                parameter.sub_(1.0)
        elif module == "embed_tokens" and isinstance(model, _GEMMA):
            # They are scaled by 8, and larger ones would make every token predict itself.
            parameter.normal_(0.0, 0.02)
        else:
            # Larger than at a real initialisation, so that attention is far from uniform and logits differ.
            parameter.normal_(0.0, 0.15)


def _write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer over a small alphabet, with ids below VOCAB and a ChatML template."""
    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    # ByteLevel writes a space as "Ġ" and a newline as "Ċ"; every other printable ASCII byte as itself.
    alphabet = [{" ": "Ġ", "\n": "Ċ"}[letter] if letter in " \n" else letter for letter in letters]
    vocabulary = {token: index for index, token in enumerate(special + alphabet + ["th", "in", "er", "an", "Ġt"])}
    assert len(vocabulary) == VOCAB
    merges = [("t", "h"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "t")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "model_max_length": 64,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
