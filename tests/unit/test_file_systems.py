"""File systems without links, locks, exchange or fsync of folders: a run is saved, resumed and read all the same."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_dist.checkpoint.folder import export, newest_checkpoint, read_checkpoint
from lowrank_dist.checkpoint.inspection import inspect_folder
from lowrank_dist.config import load_config
from lowrank_dist.doctor.storage import Probe
from lowrank_dist.engine import checkpoint_writer
from lowrank_dist.engine.checkpoint_writer import CheckpointWriter, Facts, FollowingWriteError, Retention
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import DiskError
from lowrank_dist.formats.atomic import UNSUPPORTED, atomic_folder, is_temporary
from lowrank_dist.formats.paths import detect_removal, resolve_link
from lowrank_dist.formats.provenance import Provenance
from lowrank_dist.methods.files import WEIGHTS_FILE
from lowrank_dist.untrusted.files import follow_file
from tests import faults
from tests.faults import Zygote
from tests.integration.launching import ROOT
from tests.unit.test_checkpoint_faults import StandIn, state_of
from tests.unit.test_checkpoint_folder import SHAPES, tensors_of

EVERYTHING = ("symlink", "link", "lock", "exchange", "fsync", "fsync-folder")
NO_LINKS = "this file system has no symbolic links"


def writer_in(root: Path, resumed: int | None = None) -> CheckpointWriter:
    folder = RunFolder(root)
    folder.checkpoints.mkdir(exist_ok=True)
    facts = Facts(Provenance("cd" * 32, "base", {}), state_of(2).data, None)
    method: Any = StandIn()
    return CheckpointWriter(
        folder, method, SHAPES, facts, Retention(1, 1, "loss"), None if resumed is None else state_of(resumed)
    )


def save(root: Path, kinds: list[str], code: int) -> dict[str, Any]:
    """Save two steps, the last one twice, where operations of these kinds fail with `code`."""
    faults.refuse(*kinds, code=code)
    writer, remarks = writer_in(root), []
    for step, final in ((2, False), (4, True), (4, True)):
        writer.write([tensors_of(step)], state_of(step), final=final)
        remarks.append(writer.remarks)
    return {"remarks": remarks, "summary": writer.summary}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(f"{__name__}:save") as process:
        yield process


@pytest.mark.parametrize(
    ("kinds", "code"),
    [
        *((("symlink",), code) for code in sorted(UNSUPPORTED)),
        (EVERYTHING, errno.EINVAL),
        (EVERYTHING, errno.EPERM),
    ],
)
def test_a_run_where_the_file_system_lacks_operations(
    zygote: Zygote, tmp_path: Path, kinds: tuple[str, ...], code: int
) -> None:
    ended = zygote.run(tmp_path, kinds, code)
    assert ended.error is None, ended.traceback
    first, *later = ended.value["remarks"]
    assert NO_LINKS in first and later == ["", ""], "it is reported once"
    assert "checkpoints/last: step 4; checkpoints/best: step 4" in ended.value["summary"]
    checkpoints = tmp_path / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"last", "best", "step-4"}
    assert not any(is_temporary(path) for path in tmp_path.rglob("*"))
    found = newest_checkpoint(checkpoints)
    assert found.folder == checkpoints / "step-4" and not found.skipped
    for name in ("last", "best"):
        link = checkpoints / name
        assert link.is_file() and not link.is_symlink() and resolve_link(link) == checkpoints / "step-4"
        with detect_removal(link) as folder:
            assert (folder / WEIGHTS_FILE).is_file()
        export(link, tmp_path / f"exported-{name}")
    assert inspect_folder(checkpoints / "best", read_config=lambda path: {}).facts["step"] == 4
    (tmp_path / "metrics.jsonl").touch()
    report = inspect_folder(tmp_path, read_config=lambda path: {"method": "lora"})
    assert (report.facts["last"], report.facts["best"]) == ("step-4", "step-4")
    assert not [line for line in (*report.problems, *report.warnings) if "last" in line or "best" in line]


def test_a_file_system_with_links_has_links(zygote: Zygote, tmp_path: Path) -> None:
    ended = zygote.run(tmp_path, ["fsync-folder"], errno.EINVAL)
    assert ended.error is None and ended.value["remarks"] == ["", "", ""]
    assert (tmp_path / "checkpoints" / "last").readlink() == Path("step-4")


def test_a_link_that_a_failing_disk_refuses_is_reported_and_its_target_stays(zygote: Zygote, tmp_path: Path) -> None:
    """The control: EIO does not mean that there are no links. The checkpoint is complete all the same."""
    ended = zygote.run(tmp_path, ["symlink"], errno.EIO)
    assert ended.error is None, ended.traceback
    assert all("could not be moved to step-" in line and NO_LINKS not in line for line in ended.value["remarks"])
    assert "checkpoints/step-4, the last: step 4" in ended.value["summary"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-4"}


@pytest.mark.parametrize("kind", ["fsync", "exchange"])
def test_a_disk_that_fails_is_an_error(zygote: Zygote, tmp_path: Path, kind: str) -> None:
    ended = zygote.run(tmp_path, [kind], errno.EIO)
    assert "DiskError" in ended.classes


def test_a_file_system_without_renames_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mounts of object stores are: nothing can be written in one step there."""

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSYS, "Function not implemented", str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(DiskError, match="give an output path on another one .lowrank-dist doctor CONFIG"),
        atomic_folder(tmp_path / "out"),
    ):
        pass
    assert os.listdir(tmp_path) == []


def doctor(root: Path, kinds: list[str], code: int) -> list[tuple[str, str, str]]:
    """Return what doctor says of a run folder where operations of these kinds fail with `code`."""
    faults.refuse(*kinds, code=code)
    probe = Probe(root / "run")
    try:
        return [(row.what, row.state, row.detail) for row in probe.write()]
    finally:
        probe.remove()


@pytest.fixture(scope="module")
def doctor_zygote() -> Iterator[Zygote]:
    with Zygote(f"{__name__}:doctor") as process:
        yield process


@pytest.mark.parametrize(
    ("kinds", "state", "said"),
    [
        ([], "ok", ["links, locks, renames and fsync work"]),
        (
            ["symlink"],
            "warning",
            ["without symbolic links (Operation not permitted): checkpoints/last and best are files"],
        ),
        (["lock"], "warning", ["without locks (Operation not permitted): two runs in one folder are not noticed"]),
        (["exchange"], "warning", ["without exchange of two folders: a run that is killed"]),
        (["fsync-folder"], "warning", ["without fsync of folders: a power failure"]),
        (["fsync"], "warning", ["without fsync of files: a power failure"]),
        (
            ["link", "symlink"],
            "warning",
            ["without symbolic links", "without hard links", "FAILED may name the second"],
        ),
    ],
)
def test_doctor_names_what_is_missing(
    doctor_zygote: Zygote, tmp_path: Path, kinds: list[str], state: str, said: list[str]
) -> None:
    ended = doctor_zygote.run(tmp_path, kinds, errno.EPERM)
    assert ended.error is None, ended.traceback
    folder, (what, found, detail) = ended.value
    assert folder[:2] == ["run folder", "ok"] and (what, found) == ("file system", state)
    assert all(text in detail for text in said), detail
    assert os.listdir(tmp_path) == [], "nothing is left"


def test_doctor_calls_a_file_system_without_renames_unsafe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSYS, "Function not implemented", str(self))

    monkeypatch.setattr(Path, "replace", refuse)
    _, row = Probe(tmp_path).write()
    assert row.state == "broken" and "without replacing a file by a rename (Function not implemented)" in row.detail
    assert "a run is not safe here: set output.dir to another file system" in row.detail
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DiskError, match="a run is not safe on this file system"):
        Probe(tmp_path).write()


def test_a_folder_in_place_of_a_link(tmp_path: Path) -> None:
    """Copies to an object store or with `cp -rL` make a folder of a link. The save is complete, and says so."""
    writer = writer_in(tmp_path)
    writer.write([tensors_of(2)], state_of(2), final=False)
    last, metrics = tmp_path / "checkpoints" / "last", tmp_path / "metrics.jsonl"
    last.unlink()
    last.mkdir()
    writer.write([tensors_of(4)], state_of(4), final=False)
    assert f"{last} could not be moved to step-4, which is complete (Is a directory)" in writer.remarks
    assert "checkpoints/step-4, the last: step 4; checkpoints/best: step 4" in writer.summary
    metrics.touch()
    report = inspect_folder(tmp_path, read_config=lambda path: {"method": "lora"})
    assert any(f"{last}: a folder instead of a link" in line for line in report.warnings)
    assert not any("last" in line for line in report.problems)


LAYERS = """
cd "$0" && mkdir upper work merged
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work,userxattr merged || exit 77
exec "$@"
"""
RESUMED = """
import sys
from pathlib import Path
from tests.unit.test_file_systems import save_again
print(save_again(Path(sys.argv[1])))
"""


def save_again(root: Path) -> str:
    """Save the last step of a run once more, and one step more, and return the remarks."""
    writer = writer_in(root, resumed=4)
    writer.write([tensors_of(4)], state_of(4), final=True)
    writer.write([tensors_of(6)], state_of(6), final=True)
    return writer.remarks


def test_a_run_in_a_lower_layer_of_an_overlay(tmp_path: Path) -> None:
    """A run of a container's image: its folders cannot be renamed there, and so neither exchanged nor retired."""
    lower, merged = tmp_path / "lower", tmp_path / "merged"
    lower.mkdir()
    for step in (2, 4):
        writer_in(lower).write([tensors_of(step)], state_of(step), final=True)
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", LAYERS, str(tmp_path)]
    command += [sys.executable, "-c", RESUMED, str(merged)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or "unshare: " in done.stderr:
        pytest.skip(f"no overlay in a mount namespace: {done.stderr[-200:]}")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    changed = {
        path.name for path in (tmp_path / "upper" / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink()
    }
    assert changed == {"step-6"}, "step-4 is deleted in the upper layer"
    assert read_checkpoint(tmp_path / "upper" / "checkpoints" / "step-6").step == 6


def test_what_follows_a_complete_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise DiskError(f"{tmp_path / 'adapter'}: could not be written (No space left on device)")

    writer = writer_in(tmp_path)
    monkeypatch.setattr(checkpoint_writer, "copy_adapter", full)
    complete = f"{tmp_path}/checkpoints/step-2 is complete, but {tmp_path}/adapter: could not be written"
    with pytest.raises(FollowingWriteError, match=complete):
        writer.write([tensors_of(2)], state_of(2), final=True)


@pytest.mark.parametrize(
    ("name", "content", "leads_to"),
    [
        ("last", b"step-12\n", "step-12"),
        ("best", b"step-12", "step-12"),
        ("other", b"step-12\n", "other"),
        ("last", b"../secret\n", "last"),
        ("last", b"step-1/../../secret\n", "last"),
        ("last", b"step-0\n", "last"),
        ("last", b"step-1\nstep-2\n", "last"),
        ("last", b"\xff\xfe", "last"),
        ("last", b"step-1" + b"0" * 10_000, "last"),
        ("last", b"", "last"),
    ],
)
def test_files_that_stand_for_links(tmp_path: Path, name: str, content: bytes, leads_to: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert follow_file(tmp_path / name) == resolve_link(tmp_path / name) == tmp_path / leads_to


def test_no_pipe_is_waited_for_and_folders_stay(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last")
    (tmp_path / "best").mkdir()
    for path in (tmp_path / "last", tmp_path / "best", Path("."), Path("/")):
        assert resolve_link(path) == path


def test_the_configuration_follows_them(tmp_path: Path) -> None:
    (tmp_path / "best").write_text("step-4\n")
    file = tmp_path / "config.yaml"
    sections = {"model": {"path": f"{tmp_path}/best"}, "lora": {"init_from": f"{tmp_path}/best"}}
    sections |= {"data": {"train": "train.jsonl"}, "output": {"dir": "run"}}
    file.write_text(json.dumps(sections))
    config = load_config(file)
    assert config.model.path == config.lora.init_from == tmp_path / "step-4"
    assert config.inputs["lora.init_from"] == tmp_path / "step-4"
