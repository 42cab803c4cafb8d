"""The fault injector, proved on `atomic_folder`: a kill or a full disk at every operation of a write."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lowrank_dist.formats.atomic import atomic_folder, is_temporary
from tests import faults
from tests.faults import Action, Outcome, Zygote

pytestmark = pytest.mark.slow

OLD = {"a": "old a", "b": "old b"}
NEW = {"a": "new a" * 1000, "sub/c": "new c"}
KILLS = (Action.KILL_BEFORE, Action.KILL_DURING)


# ---- Code that runs in the zygote's children ----


def write_atomically(root: Path, replace: bool) -> None:
    with atomic_folder(root / "out", replace=replace) as folder:
        _write(folder)


def write_in_place(root: Path, replace: bool) -> None:
    """The negative control: a writer that does what `atomic_folder` prevents."""
    if replace:
        shutil.rmtree(root / "out")
    (root / "out").mkdir()
    _write(root / "out")


def use_every_call(root: Path) -> None:
    (root / "a").write_bytes(b"1" * 8)
    (root / "x" / ".." / "folder").mkdir()
    with (root / "a").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"22", 0)
        os.writev(file.fileno(), [b"3", b"4444"])
        os.fdatasync(file.fileno())
        os.ftruncate(file.fileno(), 4)
    shutil.copyfile(root / "a", root / "folder" / "b")
    folder = os.open(root / "folder", os.O_RDONLY)
    os.rename("b", "c", src_dir_fd=folder, dst_dir_fd=folder)
    os.symlink("c", "link", dir_fd=folder)
    os.link("c", "d", src_dir_fd=folder, dst_dir_fd=folder)
    os.mkdir("e", dir_fd=folder)
    os.fsync(folder)
    os.close(folder)
    os.chdir(root)
    os.rename("a", "b")
    os.unlink("b")
    Path("/dev/null").write_bytes(b"elsewhere")
    shutil.rmtree("folder")


def write_safetensors(root: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1000)}, root / "x.safetensors")


def write_from_threads(root: Path) -> None:
    threads = [threading.Thread(target=(root / str(i)).write_text, args=("x",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- Helpers ----


@pytest.fixture(scope="module")
def zygote() -> Iterator[Callable[[str], Zygote]]:
    started: dict[str, Zygote] = {}

    def of(function: str) -> Zygote:
        if function not in started:
            started[function] = Zygote(f"{__name__}:{function}")
        return started[function]

    yield of
    for process in started.values():
        process.close()


def _write(folder: Path) -> None:
    (folder / "sub").mkdir()
    for name, text in NEW.items():
        (folder / name).write_text(text)


def _fresh_root(base: Path, replace: bool) -> Path:
    root = base / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    if replace:
        (root / "out").mkdir()
        for name, text in OLD.items():
            (root / "out" / name).write_text(text)
    return root


def _content(folder: Path) -> dict[str, str] | None:
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def _broken_promises(root: Path, replace: bool) -> list[str]:
    """Return paths that a reader could mistake for a finished folder."""
    content = _content(root / "out")
    broken = [] if content in (OLD if replace else None, NEW) else [f"out is {content}"]
    return broken + [f"{path.name} is left" for path in root.iterdir() if path.name != "out" and not is_temporary(path)]


def _point(outcome: Outcome, action: Action) -> str:
    return f"{action.name} at {outcome.count}: {outcome.trace[-1]}"


# ---- Tests ----


def test_every_call_is_seen(tmp_path: Path, zygote: Callable[[str], Zygote]) -> None:
    (tmp_path / "x").mkdir()
    outcome = zygote("use_every_call").run(tmp_path)
    assert outcome.error is None, outcome.traceback
    assert outcome.count == len(outcome.trace) and outcome.trace[:-5] == [
        "create a",
        "write a (8 bytes)",
        "mkdir folder",
        "write a (2 bytes)",
        "write a (5 bytes)",
        "fsync a",
        "truncate a",
        "create folder/b",
        "write folder/b (4 bytes)",
        "rename folder/b -> folder/c",
        "symlink folder/link",
        "link folder/c -> folder/d",
        "mkdir folder/e",
        "fsync folder",
        "rename a -> b",
        "unlink b",
    ]
    # Compared sorted: files are removed in the directory's order.
    removed = ["rmdir folder/e", "unlink folder/c", "unlink folder/d", "unlink folder/link"]
    assert sorted(outcome.trace[-5:-1]) == removed
    assert outcome.trace[-1] == "rmdir folder"


def test_a_rename_without_libc_is_seen(tmp_path: Path, zygote: Callable[[str], Zygote]) -> None:
    """safetensors renames with its own system call, without libc."""
    process = zygote("write_safetensors")
    plain = process.run(tmp_path)
    assert plain.error is None and plain.trace[-1].startswith("rename .tmp"), plain
    assert plain.trace[-1].endswith("-> x.safetensors")
    (tmp_path / "x.safetensors").unlink()
    assert process.run(tmp_path, nth=plain.count, action=Action.KILL_BEFORE).killed
    assert not (tmp_path / "x.safetensors").exists()
    full = process.run(tmp_path, nth=plain.count, action=Action.NO_SPACE_ONCE)
    assert full.error is not None and "No space" in full.error and not (tmp_path / "x.safetensors").exists()
    assert process.run(tmp_path, nth=plain.count, action=Action.KILL_DURING).killed
    assert (tmp_path / "x.safetensors").exists()


def test_a_kill_stops_every_thread(tmp_path: Path, zygote: Callable[[str], Zygote]) -> None:
    process = zygote("write_from_threads")
    assert sorted(process.run(tmp_path).trace) == sorted(
        [f"create {i}" for i in range(8)] + [f"write {i} (1 bytes)" for i in range(8)]
    )
    for nth in range(1, 17):
        root = _fresh_root(tmp_path, replace=False)
        assert process.run(root, nth=nth, action=Action.KILL_BEFORE).killed
        # An earlier thread may not have reached its file.
        assert sum(1 + path.stat().st_size for path in root.iterdir()) < nth


def test_a_full_disk_takes_half_a_write_first(tmp_path: Path, zygote: Callable[[str], Zygote]) -> None:
    process = zygote("write_in_place")
    plain = process.run(_fresh_root(tmp_path, replace=False), False)
    nth = plain.trace.index("write out/a (5000 bytes)") + 1
    for action, written in ((Action.NO_SPACE, 2500), (Action.NO_SPACE_ONCE, 0), (Action.KILL_DURING, 2500)):
        root = _fresh_root(tmp_path, replace=False)
        outcome = process.run(root, False, nth=nth, action=action)
        assert outcome.killed == (action is Action.KILL_DURING)
        assert outcome.killed or (outcome.error is not None and "No space" in outcome.error)
        assert (root / "out" / "a").stat().st_size == written


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("action", KILLS)
def test_a_kill_at_every_operation(
    tmp_path: Path, zygote: Callable[[str], Zygote], action: Action, replace: bool
) -> None:
    process = zygote("write_atomically")
    plain = process.run(_fresh_root(tmp_path, replace), replace)
    assert plain.error is None and plain.count == len(plain.trace) >= 12
    assert _content(tmp_path / "root" / "out") == NEW
    for nth in range(1, plain.count + 1):
        root = _fresh_root(tmp_path, replace)
        outcome = process.run(root, replace, nth=nth, action=action)
        assert outcome.killed and outcome.count == nth
        assert not _broken_promises(root, replace), _point(outcome, action)


@pytest.mark.parametrize("replace", [False, True])
def test_a_full_disk_at_every_operation(tmp_path: Path, zygote: Callable[[str], Zygote], replace: bool) -> None:
    process = zygote("write_atomically")
    plain = process.run(_fresh_root(tmp_path, replace), replace)
    # After the exchange only the old folder's files are removed, which needs no space.
    needing = [n for n, text in enumerate(plain.trace, 1) if not text.startswith(("unlink", "rmdir"))]
    assert "fsync" in plain.trace[needing[-1] - 1] and needing[-1] >= plain.count - 3
    for nth in range(1, plain.count + 1):
        root = _fresh_root(tmp_path, replace)
        outcome = process.run(root, replace, nth=nth, action=Action.NO_SPACE)
        if nth > needing[-1]:
            assert outcome.error is None and _content(root / "out") == NEW
            continue
        assert not outcome.killed and "UserError" in outcome.classes, outcome
        assert outcome.error is not None and "free some space" in outcome.error
        # The last fsync comes after the rename: the new folder already has its name and is complete.
        expected = NEW if nth == needing[-1] else OLD if replace else None
        assert _content(root / "out") == expected, _point(outcome, Action.NO_SPACE)
        assert [path.name for path in root.iterdir()] == (["out"] if expected else [])


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("action", [*KILLS, Action.NO_SPACE])
def test_a_writer_in_place_is_caught(
    tmp_path: Path, zygote: Callable[[str], Zygote], action: Action, replace: bool
) -> None:
    process = zygote("write_in_place")
    points = process.run(_fresh_root(tmp_path, replace), replace).count
    broken = 0
    for nth in range(1, points + 1):
        root = _fresh_root(tmp_path, replace)
        process.run(root, replace, nth=nth, action=action)
        broken += bool(_broken_promises(root, replace))
    assert broken >= points // 2


def test_a_process_without_the_shim_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="environment"):
        faults.arm(tmp_path)


def test_a_missing_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(faults.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="C compiler"):
        faults.build()
