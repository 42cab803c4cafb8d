"""Findings on torch's extension builds: locks that killed builds left, and the ninja that builds use."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from lowrank_dist.backend.libraries import STALE_SECONDS, stale_build_locks
from lowrank_dist.doctor import software


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"])
def test_a_lock_that_a_killed_build_left(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's own folder for builds, or in the one that the user chose."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert stale_build_locks() == []
    lock = Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    assert lock.is_relative_to(tmp_path), "torch builds elsewhere than this test thinks"
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert stale_build_locks() == [], "a build that has just begun is no stale one"
    assert stale_build_locks(now=time.time() + STALE_SECONDS + 60) == [lock]
    old = time.time() - STALE_SECONDS - 60
    os.utime(lock, (old, old))
    assert stale_build_locks() == [lock]
    (row,) = software.build_locks()
    assert row.state == "warning" and f"`rm {lock}`" in row.detail
    baton.release()
    assert stale_build_locks() == []
    (row,) = software.build_locks()
    assert row.state == "ok"


def test_locks_of_another_python_are_none_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = tmp_path / "torch_extensions" / "py27_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert stale_build_locks(now=time.time() + 2 * STALE_SECONDS) == []


def test_a_lock_that_goes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "lock").symlink_to(tmp_path / "nowhere")
    assert stale_build_locks(now=time.time() + 2 * STALE_SECONDS) == []


def make_ninja(folder: Path, version: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "ninja"
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return str(path)


def test_two_ninjas(tmp_path: Path) -> None:
    """The system's ninja, which a shell over ssh finds, and the environment's each build again what the other built."""
    system, own = tmp_path / "system", tmp_path / "venv"
    path = make_ninja(system, "1.11.1")
    make_ninja(own, "1.13.0")
    row = software.ninja(path, own)
    assert row.state == "warning" and row.alike == "1.11.1" and row.if_unlike == "warning"
    for said in (path, "1.11.1", str(own / "ninja"), "1.13.0", f"put {own} first on PATH"):
        assert said in row.detail
    make_ninja(own, "1.11.1")
    row = software.ninja(path, own)
    assert (row.state, row.alike, row.if_unlike) == ("ok", "1.11.1", "warning")
    shutil.rmtree(own)
    assert software.ninja(path, own).state == "ok"


def test_no_ninja_on_path(tmp_path: Path) -> None:
    row = software.ninja(None, tmp_path)
    assert row.state == "off" and "`pip install ninja`" in row.detail
    make_ninja(tmp_path, "1.13.0")
    row = software.ninja(None, tmp_path)
    assert row.state == "off" and f"put {tmp_path} on PATH" in row.detail and "pip" not in row.detail


def test_a_ninja_that_does_not_run(tmp_path: Path) -> None:
    path = make_ninja(tmp_path, "1.13.0")
    Path(path).write_text("#!/bin/sh\nexit 3\n")
    assert software.ninja(path, tmp_path / "none").state == "off"
