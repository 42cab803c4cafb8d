"""A folder appears complete or not at all."""

import ctypes
import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from lowrank_dist.errors import UserError
from lowrank_dist.formats import atomic
from lowrank_dist.formats.atomic import atomic_folder, is_temporary, temporary_name


def test_the_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("1")
        assert not target.exists() and is_temporary(temporary) and temporary.parent == target.parent
    assert (target / "sub" / "x").read_text() == "1"
    assert os.listdir(target.parent) == ["out"] and not is_temporary(target)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    for failure in (RuntimeError("boom"), KeyboardInterrupt()):
        with pytest.raises(type(failure)), atomic_folder(tmp_path / "out") as temporary:
            (temporary / "x").write_text("1")
            raise failure
        assert os.listdir(tmp_path) == []


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
        with (
            pytest.raises(UserError, match="File too large.*FAT.*`ulimit -f`"),
            atomic_folder(tmp_path / "out") as folder,
        ):
            (folder / "x").write_bytes(bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == []


def test_a_kill_leaves_only_a_recognisable_folder(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "x").write_text("1")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert is_temporary(left) and left.name.startswith(".out")
    with atomic_folder(tmp_path / "out") as temporary:
        assert temporary != left and not left.exists(), "the next writer removes it"
    assert os.listdir(tmp_path) == ["out"]


def test_only_what_nobody_writes_is_removed(tmp_path: Path) -> None:
    others = [temporary_name(tmp_path / "other"), temporary_name(tmp_path / "out")]
    for folder in others:
        folder.mkdir()
    (others[0] / "x").touch()  # the second is empty, like a folder that its writer has not locked yet
    with atomic_folder(tmp_path / "out", replace=True) as first:
        (first / "x").touch()
        with atomic_folder(tmp_path / "out", replace=True) as second:
            assert first.exists() and second.exists()
        assert first.exists() and (tmp_path / "out").exists()
    assert all(folder.exists() for folder in others)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    child = os.fork()
    if child == 0:
        signal.signal(number, signal.SIG_DFL)
        try:
            with atomic_folder(tmp_path / "out") as temporary:
                (temporary / "x").write_text("1")
                os.kill(os.getpid(), number)
        except SystemExit as end:
            os._exit(end.code)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    assert os.listdir(tmp_path) == []


def test_a_signal_that_somebody_handles_stays_theirs(tmp_path: Path) -> None:
    """A rank that is told to stop continues until it has saved."""
    told = []
    before = signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    try:
        with atomic_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert told and (tmp_path / "out").is_dir()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with atomic_folder(tmp_path / "other"):
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_existing_target_is_kept(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    {"folder": target.mkdir, "file": target.touch, "link": lambda: target.symlink_to(tmp_path / "none")}[kind]()
    with pytest.raises(UserError, match="out"), atomic_folder(target, replace=kind != "folder"):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", ["renameat2", "two renames", "no renameat2"])
def test_replace_swaps_and_removes_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()

    class Library:
        @staticmethod
        def renameat2(*_: object) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

    if exchange != "renameat2":
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: Library if exchange == "two renames" else object())
    with atomic_folder(target, replace=True) as temporary:
        (temporary / "new").touch()
        assert os.listdir(target) == ["old"]
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["out"]


def test_a_failed_replace_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if is_temporary(self) and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, to)

    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="Input/output error"), atomic_folder(target, replace=True):
        pass
    assert os.listdir(target) == ["old"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failing_disk_is_a_user_error_with_the_path(tmp_path: Path, code: int) -> None:
    with pytest.raises(UserError, match=str(tmp_path / "out")) as caught, atomic_folder(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert os.strerror(code) in str(caught.value) and os.listdir(tmp_path) == []


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = atomic.sync
    monkeypatch.setattr(
        atomic, "sync", lambda path: (synced.append((path.name, (tmp_path / "out").exists())), sync(path))
    )
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a").touch()
        (temporary / "sub" / "b").touch()
    assert sorted(synced) == sorted(
        [("a", False), ("b", False), ("sub", False), (temporary.name, False), (tmp_path.name, True)]
    )
