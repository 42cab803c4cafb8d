"""Models of images and text as they are published: names in files, refusals, PEFT and merge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Gemma3TextConfig

from lowrank_dist.arch.config_json import config_notes, parse_architecture, read_architecture
from lowrank_dist.config import config_of
from lowrank_dist.engine.run_method import completed_method
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import check_checkpoint, open_checkpoint
from lowrank_dist.merging.merge import merge
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny_with_images

KINDS = ("gemma3", "mistral3")
NEW_NAMES = {
    "language_model.lm_head": "lm_head",
    "language_model.model.": "model.language_model.",
    "vision_tower": "model.vision_tower",
    "multi_modal_projector": "model.multi_modal_projector",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make_tiny_with_images(kind, tmp_path_factory.mktemp("images") / kind) for kind in KINDS}


def renamed(folder: Path, out: Path, names: dict[str, str]) -> Path:
    """Return a copy of a model folder in which beginnings of tensors' names are replaced."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    for old, new in names.items():
        assert any(name.startswith(old) for name in tensors) or old == "language_model.lm_head"
        tensors = {new + name[len(old) :] if name.startswith(old) else name: each for name, each in tensors.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def check(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        check_checkpoint(read_architecture(folder), checkpoint)


@pytest.mark.parametrize("kind", KINDS)
def test_names_in_files(kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    """Controls: a tensor of another name in the text part, and one in no known part."""
    check(tiny[kind])
    check(renamed(tiny[kind], tmp_path / "new", NEW_NAMES))
    q_proj = "language_model.model.layers.0.self_attn.q_proj"
    with pytest.raises(UserError, match=r"is missing.*\n.*q_prox.weight does not exist in a"):
        check(renamed(tiny[kind], tmp_path / "q", {q_proj: q_proj[:-1] + "x"}))
    with pytest.raises(UserError, match=r"tensors \(audio_tower.*do not exist in a"):
        check(renamed(tiny[kind], tmp_path / "a", {"vision_tower": "audio_tower"}))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_outside_and_inside(kind: str, tiny: dict[str, Path]) -> None:
    values = json.loads((tiny[kind] / "config.json").read_text())
    assert config_notes(tiny[kind]) == []
    tied = {key: parse_architecture(values | {"tie_word_embeddings": key}, "c").tied for key in (True, False)}
    assert tied == {True: True, False: False}
    inner = values["text_config"]
    if kind == "gemma3":  # published ones leave these out
        less = {key: value for key, value in inner.items() if key not in ("num_attention_heads", "vocab_size")}
        assert parse_architecture(values | {"text_config": less}, "c").vocab == Gemma3TextConfig().vocab_size
    for changes, message in (
        ({"quantization_config": {"quant_method": "fp8"}}, "c: quantization_config: quantized"),
        ({"text_config": inner | {"quantization_config": {"bits": 4}}}, "c: text_config: quantization_config"),
        ({"text_config": inner | {"model_type": "llama"}}, "c: text_config: model_type 'llama' is not supported in a"),
        ({"text_config": None}, "c: text_config must be an object"),
    ):
        with pytest.raises(UserError, match=message):
            parse_architecture(values | changes, "c")


def test_other_methods_are_refused(tiny: dict[str, Path]) -> None:
    settings = {"model": {"path": str(tiny["gemma3"])}, "data": {"train": "x.jsonl"}, "output": {"dir": "out"}}
    with pytest.raises(UserError, match="method: full is not supported for a gemma3"):
        completed_method(config_of(settings, ["method=full"]))
    assert completed_method(config_of(settings, ["lora.rank=2"]))[1].family == "gemma3"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(6, 30)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapts_text_alone_and_a_merge_keeps_the_rest(kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    """Control: the ends of the same paths would reach the part for images."""
    base, out = tiny[kind], tmp_path / "merged"
    (base / "preprocessor_config.json").write_text('{"size": 16}\n')
    found = random_adapter(base, lambda module: None if module == "lm_head" else (3, 6.0))
    adapter = save_adapter(tmp_path / "adapter", base, found)
    whole = AutoModelForImageTextToText.from_pretrained(base)
    before = logits(whole)
    ends = {path.rpartition(".")[2] for path in found.factors}
    assert any("vision" in name and name.rpartition(".")[2] in ends for name, _ in whole.named_modules())
    peft = PeftModel.from_pretrained(whole, adapter).eval()
    placed = [name.split(".lora_A")[0] for name, _ in peft.named_parameters() if "lora_A" in name]
    assert sorted(placed) == sorted(f"base_model.model.{path}" for path in found.factors)
    adapted = logits(peft)
    merge(base, adapter, out)
    old, new = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(changed) == len(found.factors) and all(name.startswith("language_model.model.") for name in changed)
    assert (out / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    merged = AutoModelForImageTextToText.from_pretrained(out)
    assert type(merged) is type(peft.base_model.model)
    largest = before.abs().max()
    assert (adapted - before).abs().max() > 1e-2 * largest
    assert (logits(merged) - adapted).abs().max() < 1e-5 * largest
