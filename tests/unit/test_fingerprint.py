"""The fingerprint identifies the base: independent of sharding, changed by any change that it can see."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_dist.errors import UserError
from lowrank_dist.formats.provenance import fingerprint
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("base"))


def framed(*pieces: bytes) -> bytes:
    return b"".join(len(piece).to_bytes(8, "little") + piece for piece in pieces)


def test_is_the_documented_hash(base: Path) -> None:
    content = framed((base / "config.json").read_bytes())
    for name, tensor in sorted(load_file(base / "model.safetensors").items()):
        data = tensor.numpy().tobytes()
        content += framed(json.dumps([name, "F32", list(tensor.shape)]).encode())
        middle = (len(data) - 4096) // 2
        content += (
            framed(data) if len(data) <= 4096 else framed(data[:4096], data[middle : middle + 4096], data[-4096:])
        )
    assert fingerprint(base) == hashlib.sha256(content).hexdigest()


def test_sharding_does_not_matter(base: Path, tmp_path: Path) -> None:
    sharded = make_tiny("llama", tmp_path, max_shard_size="60KB")
    assert (sharded / "model.safetensors.index.json").exists()
    assert fingerprint(sharded) == fingerprint(base)


NAME = "model.layers.1.mlp.up_proj.weight"


def _byte(position: int) -> dict[str, torch.Tensor]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME].flatten()[position] += 1

    return change


@pytest.mark.parametrize(
    "change",
    [
        _byte(0),
        _byte(96 * 64 // 2),
        _byte(-1),
        lambda tensors: tensors.update({NAME: tensors[NAME].bfloat16()}),
    ],
)
def test_a_change_in_a_sample_is_seen(base: Path, tmp_path: Path, change) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    for name in ("config.json",):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != fingerprint(base)


def test_names_and_shapes_and_config_count(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    config = (base / "config.json").read_bytes()
    seen = {fingerprint(base)}
    variants = {
        "shape": (config, {**tensors, NAME: tensors[NAME].view(64, 96)}),
        "name": (config, {("x" if name == NAME else name): tensor for name, tensor in tensors.items()}),
        "swapped": (config, {**tensors, NAME: tensors[NAME.replace("1", "0")], NAME.replace("1", "0"): tensors[NAME]}),
        "config": (config + b"\n", tensors),
    }
    for name, (text, changed) in variants.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes(text)
        save_file(changed, folder / "model.safetensors")
        seen.add(fingerprint(folder))
    assert len(seen) == 1 + len(variants)


def test_an_incomplete_base_is_refused(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base", max_shard_size="60KB")
    next(base.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match="model-00002-of"):
        fingerprint(base)
