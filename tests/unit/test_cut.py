"""A model that is cut to one layer of each kind: config.json, names, and what both readers make of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_dist.arch.config_json import parse_architecture, read_architecture
from lowrank_dist.arch.cut import cut_config, one_of_each_kind, renumbered, source_names, whole_path
from lowrank_dist.arch.keys import UnsupportedModel
from lowrank_dist.arch.model_files import built_in_config
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.verify.cut_model import CutModel, write_cut_model
from tests.tiny_models import FAMILY_NAMES, make_tiny, make_tiny_with_images


@pytest.mark.parametrize("name", ["gemma-3-27b", "olmo-3-32b", "llama-3-8b", "gpt2-large"])
def test_one_layer_of_each_kind_of_a_published_model(name: str) -> None:
    values = built_in_config(name)
    whole = parse_architecture(values, name)
    layers = one_of_each_kind(whole, ())
    assert len(layers) == len(whole.kinds)
    cut = parse_architecture(cut_config(values, whole, layers), name)
    assert cut.layers == tuple(whole.layers[number] for number in layers)
    assert source_names(whole, layers).keys() == hf_shapes(cut).keys()


def test_preferred_layers_come_first() -> None:
    values = built_in_config("llama-3-8b")
    whole = parse_architecture(values, "")
    assert one_of_each_kind(whole, ()) == (0,)
    assert one_of_each_kind(whole, (7, 9)) == (7,)


def test_modules_are_renumbered_and_back() -> None:
    path = "model.layers.10.self_attn.q_proj"
    assert renumbered(path, 10, 1) == "model.layers.1.self_attn.q_proj"
    assert whole_path("model.layers.1.self_attn.q_proj.lora_A", (0, 10)) == f"{path}.lora_A"
    assert whole_path("lm_head.weight", (0, 10)) == "lm_head.weight"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_cut_folder_has_the_weights_of_its_layers(family: str, tmp_path: Path) -> None:
    """Our reader and transformers take the folder, and its tensors are those of the last layer of each kind."""
    whole = make_tiny(family, tmp_path / "whole")
    architecture = read_architecture(whole)
    layers = one_of_each_kind(architecture, (len(architecture.layers) - 1,))
    cut = write_cut_model(whole, tmp_path / "cut", layers, "auto")
    assert isinstance(cut, CutModel) and cut.layers == layers
    assert read_architecture(cut.folder).layers == tuple(architecture.layers[number] for number in layers)
    found, stored = load_file(cut.folder / "model.safetensors"), load_file(whole / "model.safetensors")
    for new, old in source_names(architecture, layers).items():
        assert torch.equal(found[new], stored[old]), new
    assert cut.nbytes == sum(tensor.nbytes for tensor in found.values())
    _, report = AutoModelForCausalLM.from_pretrained(cut.folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    json.loads((cut.folder / "config.json").read_text())


def test_a_model_of_images_and_text_is_refused(tmp_path: Path) -> None:
    """Before anything is written. Control: its text family, in the test above."""
    whole = make_tiny_with_images("gemma3", tmp_path / "whole")
    with pytest.raises(UnsupportedModel, match="'gemma3': a model of images and text is not cut .* verify"):
        write_cut_model(whole, tmp_path / "cut", (1,), "auto")
    assert not (tmp_path / "cut").exists()


def test_weights_are_rounded_as_a_run_rounds_them(tmp_path: Path) -> None:
    whole = make_tiny("qwen2", tmp_path / "whole")
    cut = write_cut_model(whole, tmp_path / "cut", (1,), "bf16")
    found, stored = load_file(cut.folder / "model.safetensors"), load_file(whole / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.float32
    for new, old in source_names(read_architecture(whole), (1,)).items():
        assert torch.equal(found[new], stored[old].bfloat16()), new
    assert cut.nbytes == sum(tensor.nbytes for tensor in found.values())
