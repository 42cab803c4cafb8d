"""The run folder: its owner, and the files that a start may remove."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowrank_dist.config.load import config_of
from lowrank_dist.engine import run_folder
from lowrank_dist.engine.run import Progress, merge_line
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.trainer import Trainer
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import temporary_name

VALUES: dict[str, dict[str, object]] = {"model": {"path": "b"}, "data": {"train": "t"}, "output": {"dir": "r"}}


@pytest.fixture(autouse=True)
def no_handlers_stay() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def prepared(path: Path) -> RunFolder:
    return RunFolder.prepare(path, "auto", {}, overwrite=False)


def _first_record(run: Path) -> None:
    (run / "metrics.jsonl").write_text("{}\n")


def _another_step(run: Path) -> None:
    (run / "checkpoints" / "step-4").mkdir(parents=True)


def _its_end(run: Path) -> None:
    (run / "adapter").mkdir()


@pytest.mark.parametrize("train", [_first_record, _another_step, _its_end])
def test_a_run_that_trained_meanwhile_is_not_overwritten(tmp_path: Path, train: Callable[[Path], None]) -> None:
    """Loading the model takes time between the check of the folder and its lock."""
    folder = prepared(tmp_path)
    train(tmp_path)
    with pytest.raises(UserError, match="another process wrote to .* after this one started"):
        folder.lock()
    prepared(tmp_path).lock()


def test_what_is_removed_meanwhile_is_nobodys_loss(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    folder = prepared(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-2")
    folder.lock()


def test_of_two_runs_one_has_the_lock(tmp_path: Path) -> None:
    first, second = prepared(tmp_path), prepared(tmp_path)
    first.lock()
    with pytest.raises(UserError, match="another process trains in"):
        second.lock()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EPERM])
def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder.fcntl, "flock", lambda *_: _refuse(code))
    prepared(tmp_path).lock()
    line = f"{tmp_path} cannot be locked ({os.strerror(code)}), so two runs in it would not be noticed; start only one"
    assert capsys.readouterr().err == f"lowrank_dist: {line}\n"
    assert line in (tmp_path / "logs" / "rank-0.log").read_text()


def test_a_lock_that_smb_refuses_is_held_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.fcntl, "flock", lambda *_: _refuse(errno.EACCES))
    with pytest.raises(UserError, match="another process trains in"):
        prepared(tmp_path).lock()


def _refuse(code: int) -> None:
    raise OSError(code, os.strerror(code))


def test_only_its_own_unfinished_files_are_removed(tmp_path: Path) -> None:
    """`merge --out RUN/merged` may be writing there."""
    folder = prepared(tmp_path)
    folder.lock()
    own = [folder.adapter, folder.config, folder.checkpoints / "step-6", folder.checkpoints / "last"]
    others = [tmp_path / "merged", tmp_path / "exported", folder.checkpoints / "exported", tmp_path / "step-6"]
    left = {target: temporary_name(target) for target in (*own, *others)}
    for path in left.values():
        path.mkdir()
    folder.begin("a: 1\n", anew=False)
    assert [target for target in left if not left[target].exists()] == own
    assert folder.config.read_text() == "a: 1\n"


@pytest.mark.parametrize(("method", "merges"), [("lora", True), ("full", False), ("prefix", False)])
def test_a_method_that_merges_says_the_command(tmp_path: Path, method: str, merges: bool) -> None:
    run = tmp_path / "my run"
    said = merge_line(config_of(VALUES, [f"method={method}"]), RunFolder(run))
    command = f"merge it: lowrank-dist merge --base b --adapter '{run}/adapter' --out '{run}/merged'"
    assert said == (command if merges else None)


def test_a_finished_run_that_is_resumed_says_that_nothing_is_left(tmp_path: Path) -> None:
    said: list[str] = []
    trainer: Any = Trainer.__new__(Trainer)
    trainer.run = SimpleNamespace(
        config=config_of(VALUES, []), folder=RunFolder(tmp_path), phases=SimpleNamespace(enter=lambda phase: None)
    )
    trainer.progress, trainer.steps = Progress(step=4), 4
    trainer.evaluator = SimpleNamespace(history=None)
    trainer.saver = SimpleNamespace(save=lambda progress, final: None, finish=lambda: None)
    trainer.reporter = SimpleNamespace(say=said.append)
    trainer.meter = SimpleNamespace(summary=lambda: "peak")
    assert trainer._train() and said[0] == "step 4/4: the run has ended; nothing left to train"
    assert said[1].startswith("merge it: ") and said[2] == "peak"
