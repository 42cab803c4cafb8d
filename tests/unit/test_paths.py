"""Paths: nothing is written through a link or into a folder worth keeping; nothing is copied from outside a base."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

from lowrank_dist.checkpoint.folder import export
from lowrank_dist.cli.decode import refuse_existing
from lowrank_dist.cli.main import app
from lowrank_dist.config import load_config
from lowrank_dist.engine.reporter import LossPicture, MetricsFile
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import UserError
from lowrank_dist.formats.manifest import MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE, verify_manifest, write_manifest
from lowrank_dist.formats.model_folder import INDEX_FILE, SINGLE_FILE, other_files
from lowrank_dist.formats.paths import lies_in, require_copyable, require_outside
from lowrank_dist.merging.merge import merge
from lowrank_dist.methods.full.method import build
from lowrank_dist.methods.registry import METHOD_PACKAGES
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def base(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "base"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "credentials.json"
    path.parent.mkdir()
    path.write_text('{"token": "hf_secret"}')
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- reading: files copied from a base -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer_config.json", "README.md", "original/params.json", "x.py"])
def test_merge_copies_nothing_from_outside_the_base(base: Path, secret: Path, tmp_path: Path, name: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    with pytest.raises(UserError, match=rf"{name}: a link to a file outside its folder \(.*credentials.json\); copy"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (base / name).unlink()
    merge(base, adapter, tmp_path / "out")


def test_full_fine_tuning_says_so_before_it_trains(base: Path, secret: Path) -> None:
    setting: Any = type("Setting", (), {"base": base, "seed": 0})
    build(None, setting, None)  # type: ignore[arg-type]
    (base / "LICENSE").symlink_to(secret)
    with pytest.raises(UserError, match="LICENSE: a link to a file outside"):
        build(None, setting, None)  # type: ignore[arg-type]


def _snapshot(base: Path, cache: Path) -> Path:
    """Lay out the base like huggingface_hub's cache: files named by their hash, and links to them."""
    repository = cache / "models--meta--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "original").mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    (repository / "blobs" / ("b" * 40)).write_text("{}")
    (snapshot / "original" / "params.json").symlink_to(f"../../../blobs/{'b' * 40}")
    return snapshot


def _shared_cache(base: Path, tmp_path: Path) -> Path:
    """Put the whole cache on another disk, behind a link."""
    snapshot = _snapshot(base, tmp_path / "disk")
    (tmp_path / "hub").symlink_to(tmp_path / "disk")
    return tmp_path / "hub" / snapshot.relative_to(tmp_path / "disk")


def _moved_blobs(base: Path, tmp_path: Path) -> Path:
    """Put only the blobs on another disk."""
    snapshot = _snapshot(base, tmp_path / "hub")
    blobs = snapshot.parent.parent / "blobs"
    blobs.symlink_to(blobs.rename(tmp_path / "disk"))
    return snapshot


def _local_dir(base: Path, tmp_path: Path) -> Path:
    """Lay out a download by an older huggingface_hub: large files are links into the cache."""
    snapshot = _snapshot(base, tmp_path / "hub")
    folder = tmp_path / "local"
    folder.mkdir()
    for path in snapshot.iterdir():
        if path.name in ("tokenizer.json", SINGLE_FILE):
            (folder / path.name).symlink_to(path.resolve())
        elif path.is_file():
            shutil.copy(path, folder)
    return folder


def _inner_link(base: Path, tmp_path: Path) -> Path:
    (base / "LICENSE.txt").write_text("free")
    (base / "LICENSE").symlink_to("LICENSE.txt")
    return base


def _linked_folder(base: Path, tmp_path: Path) -> Path:
    (tmp_path / "current").symlink_to(base)
    return tmp_path / "current"


def _of_links(base: Path, tmp_path: Path) -> Path:
    """Link to every file of another model folder, as `ln -s /models/tiny/* .` does."""
    (base / "LICENSE").write_text("free")
    folder = tmp_path / "links"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def _another_tokenizer(base: Path, tmp_path: Path) -> Path:
    """Link to a tokenizer in a folder that holds nothing else."""
    (tmp_path / "tokenizers").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).symlink_to((base / name).rename(tmp_path / "tokenizers" / name))
    return base


@pytest.mark.parametrize(
    "arrange",
    [
        _of_links,
        _another_tokenizer,
        _shared_cache,
        _moved_blobs,
        _local_dir,
        _inner_link,
        _linked_folder,
        lambda b, t: _snapshot(b, t),
    ],
)
def test_links_that_people_have_go_on_working(
    base: Path, pristine: Path, tmp_path: Path, arrange: Callable[[Path, Path], Path]
) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    folder = arrange(base, tmp_path)
    merge(folder, adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    copied = content(tmp_path / "out")
    assert all(copied[path.name] == path.read_bytes() for path in other_files(pristine))


@pytest.mark.parametrize(
    "target", ["../../blobs/../refs/main", "../../../models--other--secret/refs/main", "../../../blobs/x"]
)
def test_what_only_resembles_the_hubs_cache_is_refused(base: Path, tmp_path: Path, target: str) -> None:
    snapshot = _snapshot(base, tmp_path / "hub")
    link = snapshot / "notes.txt"
    link.symlink_to(target)
    place = Path(os.path.normpath(snapshot / target))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("secret")
    with pytest.raises(UserError, match="link to a file outside its folder"):
        require_copyable(link, snapshot)


def test_blobs_that_lead_elsewhere_are_no_cache(tmp_path: Path) -> None:
    """An archive that unpacks like a snapshot, but whose blobs are a link to somebody's keys."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "id_rsa").write_text("secret")
    snapshot = tmp_path / "model" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "model" / "blobs").symlink_to(home)
    (snapshot / "notes.txt").symlink_to("../../blobs/id_rsa")
    with pytest.raises(UserError, match="link to a file outside its folder"):
        require_copyable(snapshot / "notes.txt", snapshot)


# --- writing: where an output may go ---------------------------------------------------------------------------------


def _kept_folders(root: Path) -> dict[str, Path]:
    """Make one folder of each kind that must not be overwritten."""
    found = {"checkpoints": root / "run" / "checkpoints"}
    (root / "run" / "checkpoints").mkdir(parents=True)
    (root / "run" / "config.yaml").touch()
    names = {"checkpoint": (MANIFEST_FILE, STATE_FILE), "damaged": (MANIFEST_FILE, OPTIMIZER_FILE)}
    names |= {"model": ("config.json", SINGLE_FILE), "sharded": ("config.json", INDEX_FILE)}
    names |= {
        f"adapter of {package.folder}": package.files.published[:2]
        for package in METHOD_PACKAGES
        if package.files.published
    }
    for name, files in names.items():
        found[name] = root / name
        found[name].mkdir()
        for file in files:
            (found[name] / file).touch()
    return found


def test_no_output_into_a_folder_whose_content_counts(tmp_path: Path) -> None:
    for name, folder in _kept_folders(tmp_path).items():
        (tmp_path / f"link to {name}").symlink_to(folder)
        for out in (folder / "out", folder / "a" / "b", tmp_path / f"link to {name}" / "out"):
            with pytest.raises(UserError, match="is or lies in .*; give an output path outside it"):
                require_outside(out)
        require_outside(folder.with_name(f"{folder.name}-merged"))
        require_outside(folder)  # an existing path is refused for that reason
    with pytest.raises(UserError, match="a run's own folder"):
        require_outside(tmp_path / "run" / "adapter")


@pytest.mark.parametrize(
    "name", ["run/merged", "run/eval.jsonl", "site/out", "home/out", "configs/out", "checkpoints/out"]
)
def test_an_output_beside_them_is_fine(tmp_path: Path, name: str) -> None:
    """Beside a run's own files, in a folder with another program's manifest or config, in any other checkpoints/."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    files = {"site": MANIFEST_FILE, "home": "config.json", "configs": "adapter_config.json", "checkpoints": "notes.txt"}
    for folder, file in files.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    require_outside(tmp_path / name)


@pytest.mark.parametrize("command", ["export", "merge"])
@pytest.mark.parametrize("place", ["checkpoint", "adapter", "base", "checkpoints"])
def test_commands_leave_their_inputs_as_they_were(base: Path, tmp_path: Path, command: str, place: str) -> None:
    run = tmp_path / "run"
    checkpoint = save_adapter(run / "checkpoints" / "step-2", base, random_adapter(base))
    (checkpoint / STATE_FILE).write_text("{}")
    write_manifest(checkpoint)
    adapter = save_adapter(run / "adapter", base, random_adapter(base))
    (run / "config.yaml").touch()
    places = {"checkpoint": checkpoint, "adapter": adapter, "base": base, "checkpoints": checkpoint.parent}
    before = content(tmp_path)
    arguments = {
        "export": [str(checkpoint)],
        "merge": ["--base", str(base), "--adapter", str(checkpoint)],
    }[command]
    result = CliRunner().invoke(app, [command, *arguments, "--out", str(places[place] / "out")])
    assert result.exit_code == 2 and "give an output path outside it" in result.output
    assert content(tmp_path) == before
    verify_manifest(checkpoint)
    (export if command == "export" else lambda source, out: merge(base, source, out))(checkpoint, run / "merged")


def test_completions_do_not_go_into_a_checkpoint(tmp_path: Path) -> None:
    folders = _kept_folders(tmp_path)
    with pytest.raises(UserError, match="outside"):
        refuse_existing(folders["checkpoint"] / "out.jsonl")
    refuse_existing(tmp_path / "out.jsonl")


# --- writing: the folder of a run ------------------------------------------------------------------------------------


def prepare(folder: Path, resume: Literal["never", "auto"] | Path = "auto", *, overwrite: bool = False) -> RunFolder:
    return RunFolder.prepare(folder, resume, {}, overwrite=overwrite)


ENTRIES = [
    *(
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
        "probe.safetensors",
        "FAILED",
        "SAVED",
        "logs/rank-0.log",
        "logs/rank-7.log",
    ),
    *("checkpoints", "adapter", "tensorboard", "logs"),
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", ENTRIES)
def test_a_foreign_run_cannot_lead_a_resumed_one_elsewhere(
    tmp_path: Path, name: str, dangling: bool, overwrite: bool
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / name).parent.mkdir(parents=True)
    if not dangling:
        outside.touch() if "." in name or name.isupper() else outside.mkdir()
    prepare(run, overwrite=overwrite)
    (run / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"output.dir: .*{name} \(a link to .*outside\)"):
        prepare(run, overwrite=overwrite)
    assert outside.exists() != dangling


def test_a_pipe_is_refused_and_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "checkpoints").mkdir()
    (tmp_path / "disk" / "checkpoints" / "last").symlink_to("step-2")
    prepare(tmp_path / "run")
    os.mkfifo(tmp_path / "disk" / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl \(a pipe"):
        prepare(tmp_path / "run")


def test_sinks_open_nothing_through_a_link_that_came_later(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for path in (folder.metrics, folder.plot):
        path.symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic"):
        MetricsFile(folder)
    picture = LossPicture(folder, [{"step": 1, "loss": 2.0}])
    with pytest.raises(OSError, match="symbolic"):
        picture.close()
    assert not (tmp_path / "outside").exists()
    folder.plot.unlink()
    picture.close()
    assert folder.plot.read_bytes().startswith(b"\x89PNG")


def run_config(output: object, **given: object) -> Any:
    keys = {"model.path": "base", "data.train": "data/train.jsonl"} | {
        key.replace("__", "."): value for key, value in given.items()
    }
    arguments = [f"{key}={value}" for key, value in {**keys, "output.dir": output}.items()]
    Path("run.yaml").write_text("")
    return load_config("run.yaml", arguments)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "data", "tokenizer", "run/adapter", "run/checkpoints/step-2", "run/base"):
        Path(name).mkdir(parents=True)
    Path("data/train.jsonl").touch()
    Path("linked").symlink_to("base")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "given", "named"),
    [
        ("base", {}, "model.path"),
        ("./x/../base", {}, "model.path"),
        ("base/run", {}, "model.path"),
        ("base/a/b", {}, "model.path"),
        ("linked", {}, "model.path"),
        ("linked/run", {}, "model.path"),
        ("base/run", {"model__path": "linked"}, "model.path"),
        ("data/train.jsonl", {}, "data.train"),
        ("tokenizer/run", {"data__tokenizer": "tokenizer"}, "data.tokenizer"),
        ("run", {"model__path": "run/checkpoints/step-2"}, "model.path"),
        ("run", {"data__train": "run/metrics.jsonl"}, "data.train"),
        ("run", {"data__tokenizer": "run/adapter"}, "data.tokenizer"),
        ("run", {"lora__init_from": "run/adapter"}, "lora.init_from"),
    ],
)
def test_a_run_does_not_write_into_its_inputs(inputs: Path, output: str, given: dict[str, str], named: str) -> None:
    config = run_config(output, **given)
    with pytest.raises(UserError, match=rf"{named}.* is or lies in|is or lies in {named}"):
        RunFolder.prepare(config.output.dir, "auto", config.inputs, overwrite=True)


@pytest.mark.parametrize(
    ("output", "given"),
    [
        ("run", {}),
        ("base-run", {}),
        (".", {}),
        ("data/run", {}),
        ("run", {"model__path": "run/base"}),
        ("other", {"lora__init_from": "run/adapter", "data__tokenizer": "run/adapter"}),
    ],
)
def test_a_run_beside_or_above_its_inputs_is_fine(inputs: Path, output: str, given: dict[str, str]) -> None:
    config = run_config(output, **given)
    RunFolder.prepare(config.output.dir, "auto", config.inputs, overwrite=False)


def test_a_folder_is_known_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that ignores case, different names are the same folder."""
    (tmp_path / "Model").mkdir()
    assert not lies_in(tmp_path / "model" / "run", tmp_path / "Model")
    stat, exists = os.stat, Path.exists

    def folded(path: Any) -> Any:
        return str(path).replace(f"{tmp_path}/model", f"{tmp_path}/Model")

    monkeypatch.setattr(os, "stat", lambda path, **how: stat(folded(path), **how))
    monkeypatch.setattr(Path, "exists", lambda path: exists(Path(folded(path))))
    assert lies_in(tmp_path / "model" / "run", tmp_path / "Model")
    assert lies_in(tmp_path / "model", tmp_path / "Model") and not lies_in(tmp_path / "mode", tmp_path / "Model")
