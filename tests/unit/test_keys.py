"""The rule for keys of files from elsewhere: each is applied, without effect, refused, or reported in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowrank_dist.arch.config_json import UnsupportedModel, config_notes, read_architecture
from lowrank_dist.arch.config_keys import key_rule
from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.arch.generation_config import GENERATION, generation_notes
from lowrank_dist.checkpoint.folder import export
from lowrank_dist.data.keys import MESSAGE_KEYS, ROW_KEYS, TOKENIZER_KEYS, tokenizer_notes
from lowrank_dist.data.tokenizer import load_tokenizer
from lowrank_dist.errors import UserError
from lowrank_dist.merging.merge import merge
from lowrank_dist.methods import prompt_files
from lowrank_dist.methods.lora.peft_config import KEYS
from lowrank_dist.methods.registry import method_package_reading
from lowrank_dist.model.load import dtype_notes
from lowrank_dist.untrusted.keys import EMPTY, KeyRule
from tests.tiny_adapters import inspected, random_adapter, save_adapter
from tests.tiny_models import FAMILY_NAMES, make_tiny
from tests.tiny_tokenizers import dummy_prefix

Values = dict[str, Any]
CLASSES = {family: CONFIG_MAPPING[family] for family in FAMILIES}
# Keys of published config.json files, with the published values where these matter.
PUBLISHED: dict[str, Values] = {
    "llama": {  # Llama 3.1, SmolLM2, fine-tunes of Llama 2
        "_name_or_path": "x",
        "_model_name_or_path": "x",  # written by transformers for a GGUF file
        "attention_bias": False,
        "attention_dropout": 0.0,
        "is_llama_config": True,
        "max_length": 4096,
        "mlp_bias": False,
        "pad_token_id": 0,
        "pretraining_tp": 2,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 1e4,
        "torch_dtype": "float16",
        "transformers.js_config": {},
        "unsloth_version": "2025",
    },
    "qwen2": {"attention_dropout": 0.0, "use_mrope": False, "rope_theta": 1e6, "_attn_implementation_autoset": True},
    "qwen3": {"attention_bias": False, "rope_scaling": None, "use_sliding_window": False, "max_window_layers": 2},
    "mistral": {"sliding_window": None, "rope_theta": 1e6, "unsloth_fixed": True},
    "granite": {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "rope_theta": 1e7},
    "gpt2": {
        "n_ctx": 64,
        "_num_labels": 1,
        "gradient_checkpointing": False,
        "predict_special_tokens": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "output_past": True,
    },
    "phi3": {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "rope_scaling": None, "sliding_window": 2047, "auto_map": {}},
    "seed_oss": {"residual_dropout": 0.1, "attention_dropout": 0.1, "pretraining_tp": 1, "rope_theta": 1e7},
    "smollm3": {"rope_theta": 5e6, "use_sliding_window": False, "attention_bias": False, "mlp_bias": False},
    "ministral3": {"attention_dropout": 0.0, "sliding_window": None, "rope_theta": 1e6},
    "olmo3": {"attention_bias": False, "attention_dropout": 0.0, "rope_theta": 5e5},
    "glm4": {"attention_dropout": 0.0, "partial_rotary_factor": 0.5},
    "olmo2": {"attention_bias": False, "attention_dropout": 0.0, "rope_scaling": None, "rope_theta": 5e5},
    "gemma3_text": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "rope_local_base_freq": 1e4,
        "rope_scaling": None,
        "rope_theta": 1e6,
        "sliding_window_pattern": 6,
        "_sliding_window_pattern": 6,
        "use_bidirectional_attention": False,
    },
    "opt": {"activation_dropout": 0.0, "prefix": "</s>", "init_std": 0.02, "word_embed_proj_dim": 64},
}


def set_keys(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_tiny(name, tmp_path_factory.mktemp("bases") / name) for name in FAMILY_NAMES}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny("llama", tmp_path / "base")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_has_its_place(family: str) -> None:
    assert PUBLISHED[family]
    assert key_rule(FAMILIES[family]).unknown(CLASSES[family]().to_dict() | PUBLISHED[family]) == []


def test_every_key_of_other_libraries_has_its_place() -> None:
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    assert GENERATION.unknown(dict.fromkeys(GenerationConfig().to_dict(), 1)) == []
    assert KEYS.unknown(dict.fromkeys(LoraConfig().to_dict(), 1)) == []
    for config in (PrefixTuningConfig(**virtual), PromptTuningConfig(**virtual)):
        assert prompt_files.KEYS.unknown(dict.fromkeys(config.to_dict(), 1)) == []


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_is_called_without_effect_has_none(bases: dict[str, Path], family: str, tmp_path: Path) -> None:
    """transformers is the reference. The control is a refused key, which does change the numbers."""
    own = bases[family]
    without = {
        "pretraining_tp": 4,
        "initializer_range": 0.9,
        "init_std": 9.0,
        "reorder_and_upcast_attn": True,
        "use_cache": False,
        "n_ctx": 7,
        "gradient_checkpointing": True,
        "is_decoder": True,
        "tie_encoder_decoder": True,
        "chunk_size_feed_forward": 3,
        "prefix": "x",
        "task_specific_params": {"a": {"temperature": 3.0}},
        "summary_first_dropout": 0.9,
        "problem_type": "regression",
        "num_labels": 5,
        "do_sample": True,
        "rope_interleaved": True,
        "use_mrope": True,
        "pruned_heads": {},
    }
    expected = logits(own)
    assert (logits(copy_with(own, tmp_path / "without", **without)) - expected).abs().max() < 1e-5
    acausal = copy_with(own, tmp_path / "acausal", is_causal=False)
    assert (logits(acausal) - expected).abs().max() > 0.1 * expected.abs().max()
    with pytest.raises(UnsupportedModel, match="is_causal: attention to later positions"):
        read_architecture(acausal)
    assert read_architecture(copy_with(own, tmp_path / "causal", is_causal=True)) == read_architecture(own)


def copy_with(base: Path, folder: Path, **values: Any) -> Path:
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | values))
    return folder


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return model(input_ids=torch.arange(24).view(2, 12) + 5).logits


def test_dropouts_of_the_base_are_one_line(tmp_path: Path) -> None:
    """Every published GPT-2 has dropouts: they are reported and not refused; a dropout of zero is not reported."""
    for family, dropouts, said in (
        ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.0}, ["resid_pdrop=0.5", "embd_pdrop=0.1"]),
        ("opt", {"dropout": 0.1, "layerdrop": 0.2}, ["dropout=0.1", "layerdrop=0.2"]),
        ("llama", {"attention_dropout": 0.25}, ["attention_dropout=0.25"]),
    ):
        folder = make_tiny(family, tmp_path / family, **dropouts)
        (line,) = config_notes(folder)
        where, what, keys = line.split(": ")
        assert where == str(folder / "config.json") and what == "dropout of the base is not applied"
        assert set(keys.split(", ")) == set(said)
        read_architecture(folder)
    for family in ("llama", "qwen3", "granite"):
        assert config_notes(make_tiny(family, tmp_path / f"{family}-without")) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantization_config", {"bits": 4}, "quantized"),
        ("quantization", {"group_size": 64, "bits": 4}, "quantized"),  # MLX
        ("compression_config", {"format": "int"}, "quantized"),
        ("pruned_heads", {"0": [1]}, "pruned attention heads"),
        ("transformers_weights", "other.safetensors", "another name for the weights"),
    ],
)
def test_what_changes_numbers_and_is_not_applied_is_refused(base: Path, key: str, value: object, message: str) -> None:
    set_keys(base / "config.json", **{key: value})
    with pytest.raises(UnsupportedModel, match=f"config.json: {key}: .*{message}"):
        read_architecture(base)


def test_the_file_that_transformers_loads(base: Path, tmp_path: Path) -> None:
    """A key that names another weights file changes the numbers; one that names the usual file changes nothing."""
    other = make_tiny("llama", tmp_path / "other", seed=1)
    (base / "other.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    before = logits(base)
    set_keys(base / "config.json", transformers_weights="model.safetensors")
    read_architecture(base)
    assert config_notes(base) == [] and torch.equal(logits(base), before)
    set_keys(base / "config.json", transformers_weights="other.safetensors")
    assert torch.equal(logits(base), logits(other)) and not torch.equal(logits(base), before)


def test_unknown_keys_are_one_line(base: Path) -> None:
    set_keys(base / "config.json", **{"clip_qkv": 8.0, "b\x1b[31m": True, "attn_logit_softcapping": 50.0, "none": None})
    read_architecture(base)
    named = r"attn_logit_softcapping, b\x1b[31m, clip_qkv"
    assert config_notes(base) == [f"{base / 'config.json'}: unknown keys, which have no effect: {named}"]


def test_code_that_comes_along_is_not_run(base: Path) -> None:
    set_keys(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    (line,) = config_notes(base)
    assert "code that comes with the model is not run; model_type alone decides: auto_map=" in line


def test_how_the_authors_decode_is_said(base: Path) -> None:
    file = base / "generation_config.json"
    file.unlink(missing_ok=True)
    assert generation_notes(base) == []
    GenerationConfig(do_sample=False, eos_token_id=1, temperature=1.0, top_p=1.0, num_beams=1).save_pretrained(base)
    assert generation_notes(base) == []
    set_keys(file, do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.05, max_length=4096, odd=1)
    first, second = generation_notes(base)
    said = "do_sample=True, repetition_penalty=1.05, temperature=0.6, top_p=0.9, max_length=4096"
    assert first.startswith(f"{file}: not applied; decoding uses its own options: ")
    assert set(first.split(": ")[2].split(", ")) == set(said.split(", ")) and second.endswith(
        "which have no effect: odd"
    )
    file.unlink()
    set_keys(base / "config.json", temperature=0.5, odd=1)
    assert generation_notes(base) == [
        f"{base / 'config.json'}: not applied; decoding uses its own options: temperature=0.5"
    ]


def test_tokenizer_config(base: Path) -> None:
    assert tokenizer_notes(base) == tokenizer_notes(base / "tokenizer.json") == []
    set_keys(base / "tokenizer_config.json", add_bos_token=False, legacy=True, errors="replace", sp_model_kwargs={})
    assert tokenizer_notes(base) == []
    set_keys(base / "tokenizer_config.json", do_lower_case=True, auto_map={"AutoTokenizer": ["t.T", None]})
    code, unknown = tokenizer_notes(base)
    assert "code that comes with the tokenizer is not run" in code and unknown.endswith(
        "which have no effect: do_lower_case"
    )
    (base / "tokenizer_config.json").unlink()
    assert tokenizer_notes(base) == []


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"])
def test_a_class_of_transformers_that_reads_texts_otherwise_is_said(tmp_path: Path, name: str) -> None:
    """Llama 2's tokenizer class ignores the normalizer. Controls: a tokenizer that it reads alike, and the remedy."""
    folder, alike = dummy_prefix(tmp_path / "llama"), dummy_prefix(tmp_path / "alike", metaspace=True)
    for each in (folder, alike):
        set_keys(each / "config.json", model_type="llama")
        set_keys(each / "tokenizer_config.json", tokenizer_class=name)
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = load_tokenizer(folder).encode(["  a"])[0]
    assert ids != theirs("  a", add_special_tokens=False)["input_ids"]
    (line,) = tokenizer_notes(folder)
    assert (
        line.startswith(f"{folder}: tokenizer.json, which is used here, gives ▁ ▁ ▁a for '  a'")
        and type(theirs).__name__ in line
    )
    assert tokenizer_notes(alike) == []
    set_keys(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer_notes(folder) == [] and ids == theirs("  a", add_special_tokens=False)["input_ids"]
    # A class that transformers cannot construct reads nothing differently.
    for odd in ("NoTokenizer", 3, ["x"], {"a": 1}, "AlbertTokenizer"):
        set_keys(folder / "tokenizer_config.json", tokenizer_class=odd, auto_map={"AutoTokenizer": ["x.Y", None]})
        tokenizer_notes(folder)


def test_fp16_says_what_it_runs_in(base: Path, tmp_path: Path) -> None:
    half = make_tiny("llama", tmp_path / "half", dtype=torch.float16)
    (line,) = dtype_notes(half, torch.bfloat16)
    assert line.startswith(f"{half}: stored in fp16, but runs in bf16") and "model.dtype=fp32" in line
    assert dtype_notes(half, torch.float32)[0].startswith(f"{half}: stored in fp16, but runs in fp32")
    assert dtype_notes(base, torch.float32) == dtype_notes(base, torch.bfloat16) == []


def test_unknown_keys_of_an_adapter(base: Path, tmp_path: Path) -> None:
    """Merge, inspect and export report them; PEFT ignores them too."""
    folder = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    assert method_package_reading(folder).files.notes(folder) == []
    file = folder / "adapter_config.json"
    set_keys(file, some_future_switch=True, trained_with="axolotl", unset=None, modules_to_save=None)
    line = f"{file}: unknown keys, which have no effect: some_future_switch, trained_with"
    assert method_package_reading(folder).files.notes(folder) == [line]
    assert line in merge(base, folder, tmp_path / "merged").warnings
    assert line in inspected(folder, base).warnings and not inspected(folder, base).problems
    assert export(folder, tmp_path / "exported") == (line,)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        found = adapted(input_ids=torch.arange(24).view(2, 12) + 5).logits
    assert (found - logits(tmp_path / "merged")).abs().max() < 1e-4 * found.abs().max()


@pytest.mark.parametrize("key", sorted(KEYS.refused))
def test_keys_of_an_adapter_that_say_more_are_refused(base: Path, tmp_path: Path, key: str) -> None:
    folder = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    for value in (None, [], {}):
        set_keys(folder / "adapter_config.json", **{key: value})
        merge(base, folder, tmp_path / f"merged-{value}")
    set_keys(folder / "adapter_config.json", **{key: ["x"]})
    with pytest.raises(UserError, match=f"only updates s·B·A are supported.*{key}"):
        merge(base, folder, tmp_path / "merged")


def test_rules_do_not_contradict_themselves() -> None:
    rules = [KEYS, GENERATION, ROW_KEYS, MESSAGE_KEYS, TOKENIZER_KEYS, prompt_files.KEYS]
    for rule in [*rules, *map(key_rule, FAMILIES.values())]:
        places = [rule.applied, rule.without_effect, rule.refused, rule.unapplied]
        # A key that a family applies is applied, whatever the lists for all families say.
        twice = [key for key in {key for place in places[1:] for key in place} if sum(key in p for p in places[1:]) > 1]
        assert not twice


def test_true_is_not_one() -> None:
    rule = KeyRule(frozenset(), frozenset(), refused={"label": "it"}, neutral={"label": (True,)}, nothing=EMPTY)
    for value, refused in ((True, False), (1, True), (False, True), (0, True), ("", False), ([], False), (None, False)):
        assert bool(rule.refusals({"label": value})) == refused, value
