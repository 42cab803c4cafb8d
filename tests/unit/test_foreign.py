"""Adapters and checkpoints of other programs are named, in one line, with what to do with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lowrank_dist.cli.main import app
from lowrank_dist.errors import UserError
from lowrank_dist.formats.foreign import refuse_foreign_folder
from lowrank_dist.methods.lora.load import load_adapter
from tests.tiny_adapters import inspected, random_adapter, save_adapter
from tests.tiny_models import make_tiny

MLX = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}
ADAPTERHUB = {"config": {"architecture": "lora", "r": 8}, "hidden_size": 64, "model_type": "llama", "version": "1.0"}
# Files of a folder, None for a folder → the words that must name it.
FOLDERS: Mapping[str, tuple[dict[str, Any], str]] = {
    "MLX": (
        {"adapter_config.json": MLX, "adapters.safetensors": b""},
        "adapter_config.json has fine_tune_type, lora_parameters, so it is an adapter of MLX; fuse it (mlx_lm.fuse ",
    ),
    "MLX, config alone": ({"adapter_config.json": MLX}, "so it is an adapter of MLX; "),
    "MLX, old": ({"adapters.npz": b""}, "has adapters.npz, so it is an adapter of MLX"),
    "diffusers": ({"pytorch_lora_weights.safetensors": b""}, "an adapter of an image model"),
    "AdapterHub": ({"adapter_config.json": ADAPTERHUB, "pytorch_adapter.bin": b""}, "AdapterHub's library"),
    "OpenDelta": ({"adapter_config.json": {"delta_type": "lora"}}, "an adapter of OpenDelta"),
    "LitGPT": ({"lit_model.pth.lora": b""}, "an adapter of LitGPT"),
    "torchtune": (
        {"adapter_0.pt": b"", "hf_model_0001_0.pt": b""},
        "has adapter_0.pt, so it is a pickled checkpoint of torchtune",
    ),
    "torchtune's last": ({"adapter_model.pt": b"", "recipe_state.pt": b""}, "torchtune"),
    "Megatron-Bridge": ({"iter_0000050": None, "latest_checkpointed_iteration.txt": b"50"}, "NeMo or Megatron-Bridge"),
    "NeMo": ({"model.nemo": b""}, "NeMo or Megatron-Bridge"),
    "FSDP": ({"pytorch_model_fsdp_0": None}, "a sharded checkpoint of FSDP"),
    "DeepSpeed": ({"global_step50": None, "latest": b"", "zero_to_fp32.py": b""}, "a checkpoint of DeepSpeed"),
    "GGUF": ({"adapter.gguf": b""}, "has adapter.gguf, so it is a folder of GGUF files"),
    "Trainer": (
        {"checkpoint-50/adapter_config.json": {}, "checkpoint-1000/adapter_config.json": {}, "runs": None},
        ": a run of transformers' Trainer; give one of its checkpoints, such as",
    ),
}


def written(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize("program", FOLDERS)
def test_a_folder_is_named_by_every_command(program: str, base: Path, tmp_path: Path) -> None:
    files, said = FOLDERS[program]
    folder = written(tmp_path / "adapter", files)
    out = tmp_path / "out"
    for words in (
        ["inspect", folder],
        ["merge", "--base", base, "--adapter", folder, "--out", out],
        ["export", folder, "--out", out],
        ["generate", "--model", base, "--adapter", folder, "--prompt", "a"],
    ):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 2 and done.stderr.startswith(f"error: {folder}: "), (words[0], done.output)
        assert said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    if program == "Trainer":
        assert str(folder / "checkpoint-1000") in done.stderr


TENSORS: Mapping[str, tuple[list[str], str]] = {
    "MLX": (["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"], "an adapter of MLX"),
    "kohya": (["lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.alpha"], "an image model"),
    "diffusers": (["unet.down_blocks.0.to_q.lora.down.weight"], "an image model"),
    "Megatron-Bridge": (
        ["decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"],
        "an adapter of NeMo or Megatron-Bridge",
    ),
    "a state dict": (
        ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"],
        "an adapter with its name in the names of its tensors",
    ),
    "no prefix": (["model.layers.0.self_attn.q_proj.lora_A.weight"], "without 'base_model.model.'"),
    "embedding": (["base_model.model.model.embed_tokens.lora_embedding_A"], "an adapter with factors of an embedding"),
}


@pytest.mark.parametrize("program", TENSORS)
def test_tensors_are_named(program: str, base: Path, tmp_path: Path) -> None:
    names, said = TENSORS[program]
    folder = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    path = folder / "adapter_model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path, {"format": "pt"})
    with pytest.raises(UserError) as error:
        load_adapter(folder)
    assert said in str(error.value) and any(f"has {name}, so" in str(error.value) for name in names)
    assert "\n" not in str(error.value)
    assert len(inspected(folder).problems) == 1


@pytest.mark.parametrize("program", FOLDERS)
def test_a_folder_of_ours_or_of_peft_is_read_whatever_lies_beside(program: str, base: Path, tmp_path: Path) -> None:
    """The control. A Trainer's folder has checkpoints beside the adapter; others leave files of their own."""
    files = {name: content for name, content in FOLDERS[program][0].items() if name != "adapter_config.json"}
    folder = written(save_adapter(tmp_path / "adapter", base, random_adapter(base)), files)
    refuse_foreign_folder(folder)
    assert len(load_adapter(folder).ranks) == 15 and inspected(folder, base).problems == []
    refuse_foreign_folder(written(make_tiny("llama", tmp_path / "model"), files))


def test_an_unknown_folder_keeps_its_error(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", {"adapter_config.json": {"peft_type": "LOHA"}, "notes.txt": b""})
    with pytest.raises(UserError, match="peft_type is 'LOHA'; give an adapter of type LORA"):
        load_adapter(folder)
    folder = written(tmp_path / "empty", {"notes.txt": b""})
    with pytest.raises(UserError, match="adapter_config.json: missing; give a PEFT adapter folder"):
        load_adapter(folder)
