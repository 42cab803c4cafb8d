"""Damaged, truncated, copied or planted checkpoints: the fault is named, and the checkpoint skipped or refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lowrank_dist.checkpoint.folder import newest_checkpoint, read_checkpoint, step_folders, write_checkpoint
from lowrank_dist.checkpoint.training_state import KINDS, DataState, OptimizerReader, TrainingState, read_state
from lowrank_dist.cli.main import app
from lowrank_dist.errors import UserError
from lowrank_dist.formats.manifest import MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE
from lowrank_dist.formats.manifest import _text as manifest_text
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance
from lowrank_dist.methods.files import CONFIG_FILE, WEIGHTS_FILE, Collected
from lowrank_dist.methods.lora.files import AdapterFactors, LowRankFactor, read_adapter, write_adapter_files
from tests.tiny_adapters import inspected

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
FILES = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE, OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE)
SHAPES = {f"{m}.lora_{s}": (4, 16) if s == "A" else (16, 4) for m in MODULES for s in "AB"}


def state_of(step: int) -> TrainingState:
    return TrainingState(
        step=step,
        epoch=0.5,
        samples=8 * step,
        tokens=100 * step,
        target_tokens=60 * step,
        loss=1 / 3,
        eval_losses={0: 2.5, step: 1.25},
        data=DataState(path="train.jsonl", sha256="ab" * 32, samples=16),
        held_out=None,
        rng={"torch": "00ff"},
        config={"train": {"lr": 0.01}},
        base_fingerprint="cd" * 32,
        ranks={"tensor": 1, "data": 1},
        versions={"torch": "2"},
    )


def write(folder: Path, step: int) -> Path:
    provenance = Provenance("cd" * 32, "base", {}, training=state_of(step).summary())
    write_checkpoint(folder, partial(lora_files, provenance=provenance), SHAPES, [tensors_of(step)], state_of(step))
    return folder


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """Return random fp32 master weights and moments of every tensor of Θ."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(len(KINDS), *shape, generator=generator) for name, shape in SHAPES.items()}


def lora_files(folder: Path, provenance: Provenance, *, trained: bool = True) -> Collected:
    """Return the writer of method `lora`, for factors on MODULES."""

    def write_files(tensors: Mapping[str, torch.Tensor]) -> None:
        factors = {m: LowRankFactor(*(tensors[f"{m}.lora_{s}"] for s in "AB"), 8.0) for m in MODULES}
        write_adapter_files(
            folder, AdapterFactors(factors, 0.0, False, False, "base"), provenance, MODULES, trained=trained
        )

    return Collected(write_files)


def read_all(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    reader = OptimizerReader(path, shapes)
    return {name: reader.get(name) for name in shapes}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return checkpoints/ with step-2, step-4 and the links."""
    checkpoints = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (2, 4):
        write(checkpoints / f"step-{step}", step)
    for name in ("last", "best"):
        (checkpoints / name).symlink_to("step-4")
    return checkpoints


@pytest.fixture
def checkpoints(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints", symlinks=True))


def assert_newest_refused(folder: Path, name: str) -> None:
    """Check that the newer checkpoint is passed over with its bad file named, and that reading it fails."""
    found = newest_checkpoint(folder.parent)
    assert found.state is not None and found.state.step == 2
    assert any(name in reason for reason in found.skipped), found.skipped
    for read in (read_checkpoint, read_adapter):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            read(folder)


def test_a_whole_one_is_found(checkpoints: Path) -> None:
    found = newest_checkpoint(checkpoints)
    assert found.folder == checkpoints / "step-4" and not found.skipped
    assert found.state == state_of(4)
    assert {path.name for path in found.folder.iterdir()} == set(FILES)
    tensors = read_all(found.folder / OPTIMIZER_FILE, SHAPES)
    adapter = read_adapter(found.folder)
    for module in MODULES:
        assert torch.equal(tensors[f"{module}.lora_A"][0], adapter.factors[module].a)
        assert torch.equal(tensors[f"{module}.lora_B"][0], adapter.factors[module].b)
    assert read_adapter(checkpoints / "last").factors.keys() == set(MODULES)


def test_writing_again_replaces(checkpoints: Path) -> None:
    before = (checkpoints / "step-4" / OPTIMIZER_FILE).read_bytes()
    (checkpoints / "step-4" / OPTIMIZER_FILE).write_bytes(b"damaged")
    write(checkpoints / "step-4", 4)
    assert (checkpoints / "step-4" / OPTIMIZER_FILE).read_bytes() == before
    assert {path.name for path in checkpoints.iterdir()} == {"step-2", "step-4", "last", "best"}


def test_any_flipped_byte_is_seen(checkpoints: Path) -> None:
    """300 random changes of a byte, over all files."""
    draw = random.Random(5)
    for trial in range(300):
        path = checkpoints / "step-4" / FILES[trial % len(FILES)]
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ draw.randrange(1, 256)]) + whole[at + 1 :])
        assert_newest_refused(path.parent, path.name)
        path.write_bytes(whole)
    assert newest_checkpoint(checkpoints).state.step == 4, "the folder is as it was, and so it verifies again"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes() + b"\n"),
        lambda path: (path.rename(path.with_suffix(".old")), path.symlink_to(path.with_suffix(".old").name)),
    ],
    ids=["last byte", "half", "empty", "removed", "longer", "a link"],
)
def test_damaged_files(checkpoints: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(checkpoints / "step-4" / name)
    assert_newest_refused(checkpoints / "step-4", "step-4")


@pytest.mark.parametrize("name", FILES)
def test_duplicated_files(checkpoints: Path, name: str) -> None:
    shutil.copyfile(checkpoints / "step-4" / name, checkpoints / "step-4" / f"copy of {name}")
    assert_newest_refused(checkpoints / "step-4", f"copy of {name}")


def test_a_copied_folder_is_not_a_newer_one(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "step-2", checkpoints / "step-8")
    found = newest_checkpoint(checkpoints)
    assert found.folder == checkpoints / "step-4"
    assert any("step-8 is a copy of step 2" in reason for reason in found.skipped)


def test_dangling_links_are_said(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "step-4")
    found = newest_checkpoint(checkpoints)
    assert found.state.step == 2
    assert [str(checkpoints / name) + " is a broken link" for name in ("last", "best")] == list(found.skipped)


def test_unfinished_and_foreign_entries_are_no_checkpoints(checkpoints: Path) -> None:
    (checkpoints / ".step-9.lowrank_dist-tmp-1-abcd").mkdir()
    (checkpoints / "step-010").mkdir()
    (checkpoints / "step-11").write_text("a file")
    (checkpoints / "step-12").symlink_to("step-2")
    assert list(step_folders(checkpoints)) == [2, 4]
    found = newest_checkpoint(checkpoints)
    assert found.state.step == 4
    assert found.skipped == (f"{checkpoints / 'step-12'} is a link; replace it with its folder",)


class _Planted:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.place),))


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.bin", OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("listed", [False, True])
def test_a_planted_pickle_is_never_read(checkpoints: Path, tmp_path: Path, name: str, listed: bool) -> None:
    import pickle  # only to make the file that must not be read

    from lowrank_dist.formats.manifest import write_manifest

    folder, planted = checkpoints / "step-4", _Planted()
    planted.place = tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(planted))
    if listed:
        (folder / MANIFEST_FILE).unlink()
        write_manifest(folder)
    elif name not in FILES:
        assert_newest_refused(folder, name)
    for read in (read_checkpoint, read_adapter, lambda f: read_all(f / OPTIMIZER_FILE, SHAPES)):
        try:
            read(folder)
        except UserError:
            continue
    inspected(folder)
    result = CliRunner().invoke(app, ["export", str(folder), "--out", str(tmp_path / "out")])
    assert result.exit_code in (0, 2)
    assert not (tmp_path / "executed").exists()
    subprocess.run(
        [sys.executable, "-c", f"import pickle; pickle.load(open({str(folder / name)!r}, 'rb'))"], check=True
    )
    assert (tmp_path / "executed").exists(), "the control: it does run where a pickle is read"


def test_links_out_of_the_folder_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    shutil.move(checkpoints / "step-4" / WEIGHTS_FILE, tmp_path / "outside")
    (checkpoints / "step-4" / WEIGHTS_FILE).symlink_to(tmp_path / "outside")
    assert_newest_refused(checkpoints / "step-4", WEIGHTS_FILE)


def test_inspect_says_that_it_does_not_verify(checkpoints: Path) -> None:
    assert inspected(checkpoints / "step-4").facts["manifest"] == "verifies"
    os.truncate(checkpoints / "step-4" / OPTIMIZER_FILE, 100)
    report = inspected(checkpoints / "step-4")
    assert not report.verifies and any(OPTIMIZER_FILE in problem for problem in report.problems)


def test_state_that_says_too_much_or_too_little(checkpoints: Path) -> None:
    path = checkpoints / "step-4" / STATE_FILE
    whole = path.read_text()
    for text in (
        "{}",
        "[]",
        whole.replace('"step": 4', '"step": "4"'),
        whole.replace("step", "x", 1),
        # Values that pydantic reads and would write as null or leave out.
        whole.replace('"loss": 0.3333333333333333', '"loss": NaN'),
        whole.replace('"0": 2.5', '"0": Infinity'),
        whole.replace('"lr": 0.01', '"lr": 1e999'),
        whole.replace('"lr": 0.01', f'"lr": {"9" * 5000}'),
        whole.replace('"lr": 0.01', f'"lr": {"[" * 150 + "]" * 150}'),
        whole.replace('"torch": "2"', r'"torch": "\ud800"'),
        whole.replace('"lr": 0.01', '"lr": 0.01, "lr": 0.02'),
    ):
        assert text != whole
        path.write_text(text)
        with pytest.raises(UserError, match=STATE_FILE.replace(".", r"\.")):
            read_state(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files[STATE_FILE].pop("size"),
        lambda files: files[STATE_FILE].pop("sha256"),
        lambda files: files[STATE_FILE].update(size="5"),
        lambda files: files[STATE_FILE].update(other=1),
        lambda files: files.update({STATE_FILE: 5}),
        lambda files: files.update({STATE_FILE: None}),
        lambda files: files.update({"../x": files[STATE_FILE]}),
    ],
)
def test_a_manifest_that_was_written_anew_by_another_hand(
    checkpoints: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    """The manifest's own digest is correct."""
    path = checkpoints / "step-4" / MANIFEST_FILE
    files = json.loads(path.read_text())["files"]
    path.write_text(manifest_text(files))
    assert read_checkpoint(path.parent).step == 4
    change(files)
    path.write_text(manifest_text(files))
    assert_newest_refused(path.parent, "x" if "../x" in files else MANIFEST_FILE)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, '{"files": NaN}', '{"files": {"a": ' + "9" * 5000 + "}}", "7"]
)
def test_a_manifest_that_is_no_manifest(checkpoints: Path, text: str) -> None:
    path = checkpoints / "step-4" / MANIFEST_FILE
    path.write_text(text)
    assert_newest_refused(path.parent, MANIFEST_FILE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda shapes: {**shapes, "other.lora_A": (1, 1)}, "other"),
        (lambda shapes: {k: v for k, v in shapes.items() if "down" not in k}, "down_proj"),
        (lambda shapes: {k: (v[1], v[0]) for k, v in shapes.items()}, "lora.rank"),
    ],
)
def test_optimiser_of_another_run(pristine: Path, change: Callable[[dict], dict], named: str) -> None:
    with pytest.raises(UserError, match=named):
        read_all(pristine / "step-4" / OPTIMIZER_FILE, change(SHAPES))
