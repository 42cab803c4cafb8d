"""Opening a model folder: tensors that are read, files that stay unread, and refusals."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import INDEX_FILE, SINGLE_FILE, open_checkpoint
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 5, "more shards than files kept open"
    return folder


@pytest.fixture
def broken(sharded: Path, tmp_path: Path) -> Path:
    """Return a copy of the sharded folder for a test to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_single_and_sharded_hold_the_same(single: Path, sharded: Path) -> None:
    stored = load_file(single / SINGLE_FILE)
    with open_checkpoint(single) as one, open_checkpoint(sharded) as many:
        assert one.names() == many.names() == tuple(sorted(stored))
        for name in one.names():
            assert one.shape(name) == many.shape(name) == tuple(stored[name].shape)
            assert one.dtype(name) == many.dtype(name) == torch.float32
            assert one.file(name).name == SINGLE_FILE and many.file(name).parent == sharded
            assert torch.equal(one.slice(name)[1:5], stored[name][1:5])
            assert torch.equal(many.slice(name)[1:5], stored[name][1:5])


def test_a_slice_outlives_its_file_handle(sharded: Path) -> None:
    stored = {}
    for file in sharded.glob("*.safetensors"):
        stored |= load_file(file)
    checkpoint = open_checkpoint(sharded)
    views = {name: checkpoint.slice(name)[:] for name in checkpoint.names()}
    checkpoint.close()
    assert all(torch.equal(view, stored[name]) for name, view in views.items())
    assert torch.equal(checkpoint.slice("model.norm.weight")[:], stored["model.norm.weight"])
    checkpoint.close()


def test_slices_copy_nothing(tmp_path: Path) -> None:
    """64 MB are read by rows and by columns: anonymous memory must not grow with the tensor's size."""
    folder = make_tiny("llama", tmp_path / "tiny")
    save_file({"big": torch.ones(4096, 4096)}, folder / SINGLE_FILE)
    with open_checkpoint(folder) as checkpoint:
        before = anonymous_bytes()
        rows, columns = checkpoint.slice("big")[:2048], checkpoint.slice("big")[:, 2048:]
        assert rows.max() == 1 and columns.shape == (4096, 2048)
        growth = anonymous_bytes() - before
        # 256 MB: a smaller copy can fit into memory that an earlier test returned only to the allocator.
        copied = rows.repeat(8, 1)
        assert anonymous_bytes() - before - growth > 192 * 2**20, "the measure must see a real copy"
        assert growth < 8 * 2**20 and copied.shape == (8 * 2048, 4096)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def test_a_single_file_wins_over_an_index(broken: Path, single: Path) -> None:
    shutil.copy(single / SINGLE_FILE, broken)
    assert open_checkpoint(broken).file("model.norm.weight").name == SINGLE_FILE


def test_hub_cache_layout_is_followed(sharded: Path, tmp_path: Path) -> None:
    """The Hub's cache keeps files under blobs/ and links to them; such links may lead out of the folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(sharded, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert open_checkpoint(snapshot).names() == open_checkpoint(sharded).names()
    next(blobs.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="missing"):
        open_checkpoint(snapshot)


def test_main_dtype_is_what_most_elements_have(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    tensors = load_file(folder / SINGLE_FILE)
    tensors = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors | {"counts": torch.zeros(10**6, dtype=torch.int32)}, folder / SINGLE_FILE)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.main_dtype() == torch.bfloat16
    assert checkpoint.dtype("model.norm.weight") == torch.float32
    with pytest.raises(UserError, match="counts has dtype I32"):
        checkpoint.dtype("counts")
    save_file({"counts": torch.zeros(3, dtype=torch.int32)}, folder / SINGLE_FILE)
    with pytest.raises(UserError, match="no floating-point tensor"):
        open_checkpoint(folder).main_dtype()


def refused(folder: Path, *said: str) -> None:
    with pytest.raises(UserError) as error:
        open_checkpoint(folder)
    for text in said:
        assert text in str(error.value)


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such folder")
    with pytest.raises(UserError, match="no such folder"):
        read_architecture(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path / "config.json", "no such folder")


def test_missing_or_malformed_config(broken: Path) -> None:
    for content, said in (("{", "malformed JSON"), ("[]", "expected a JSON object"), ("{}", "model_type is missing")):
        (broken / "config.json").write_text(content)
        with pytest.raises(UserError, match=said):
            read_architecture(broken)
    (broken / "config.json").unlink()
    refused(broken, "config.json: missing")


def test_folder_without_weights(broken: Path) -> None:
    for file in broken.glob("*.safetensors*"):
        file.unlink()
    refused(broken, SINGLE_FILE, INDEX_FILE, "download")
    (broken / "pytorch_model.bin").write_bytes(b"\x80")
    refused(broken, "pytorch_model.bin", "safe_serialization")


def test_absent_shard_is_named_with_the_others(broken: Path) -> None:
    gone = sorted(broken.glob("*.safetensors"))[:2]
    for file in gone:
        file.unlink()
    refused(broken, f"{gone[0]}: missing", f"{gone[1]}: missing", INDEX_FILE)


@pytest.mark.parametrize(
    "name",
    ["../{}", "/tmp/{}", "sub/{}", "..", "..\\{}", "{}\0", "weights.bin", 7, None, "x" * 300 + "{}", "y" * 9999 + "{}"],
)
def test_index_may_not_choose_another_place(name: object, broken: Path) -> None:
    real = sorted(broken.glob("*.safetensors"))[0]
    shutil.copy(real, broken.parent)
    (broken / "sub").mkdir()
    shutil.copy(real, broken / "sub")
    value = name.format(real.name) if isinstance(name, str) else name
    edit_index(broken, lambda index: index["weight_map"].update({"model.norm.weight": value}))
    refused(broken, INDEX_FILE, "model.norm.weight", "in the model folder")


def test_index_naming_a_tensor_that_its_file_lacks(broken: Path) -> None:
    file = sorted(broken.glob("*.safetensors"))[0].name
    edit_index(broken, lambda index: index["weight_map"].update({"made.up.weight": file}))
    refused(broken, "made.up.weight", file)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_malformed_index(content: dict, broken: Path) -> None:
    (broken / INDEX_FILE).write_text(json.dumps(content))
    refused(broken, INDEX_FILE, "weight_map")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "huge header", "a folder"])
def test_damaged_file_is_named(damage: str, broken: Path) -> None:
    file = sorted(broken.glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    else:
        file.write_bytes(
            {
                "truncated": content[:-100],
                "empty": b"",
                "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
                "huge header": struct.pack("<Q", 2**62) + content[8:],
            }[damage]
        )
    refused(broken, str(file), "download")


def test_intact_copy_opens(broken: Path) -> None:
    assert open_checkpoint(broken).names()
