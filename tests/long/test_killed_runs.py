"""A real TP 2 × DP 2 run, killed in the middle of a save, or on a disk that fills up during it, twelve times over."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import tests.preloaded  # noqa: F401  (the zygote imports this module, and each run forks from it)
from lowrank_dist.backend.select import shutdown
from lowrank_dist.checkpoint.folder import newest_checkpoint
from lowrank_dist.engine.saving import CheckpointWriter
from lowrank_dist.supervision.rank import Supervision
from tests.faults import Action, Outcome, Zygote, arm, count, disarm
from tests.integration.launching import ROOT, free_port
from tests.integration.resuming import SAVED, STEPS, Layout, curve, make_job, tensors

LAYOUT = Layout(2, 2, 1, 2)
POINTS = 14
SAVES = 13  # the last run ends without a fault
WAIT = 120


def run(root: Path, arguments: list[str], port: int, points: list[int], action: int) -> dict[str, Any]:
    """Run launch/train.py on four ranks of this process's own: rank 0 is this one, the others are forked from it.

    points: [n] is the nth operation of all saves together, several are one for each save in turn, [] only counts.
    Returns the exit codes of all ranks and rank 0's output.
    """
    disarm()  # the counter that the zygote armed would include the other ranks' folders
    children = []
    for rank in range(1, 4):
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: they end with rank 0, however it ends
            os._exit(_rank(rank, arguments, port))
        children.append(child)
    _arm_saves(root, points, Action(action))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = _rank(0, arguments, port)
    codes = [code, *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)]
    return {"codes": codes, "said": said.getvalue(), "operations": count()}


def _rank(rank: int, arguments: list[str], port: int) -> int:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="4", LOCAL_WORLD_SIZE="4")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    sys.argv = ["launch/train.py", *arguments]
    # Leave without ending this process, which still has a result to report.
    with mock.patch.object(Supervision, "leave", lambda self, code: shutdown(clean=code == 0)):
        try:
            runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def _arm_saves(root: Path, points: list[int], action: Action) -> None:
    """Arm at the first save for good; with several points, arm again at each save."""
    write, waiting = CheckpointWriter.write, iter(points or [0])

    def armed(self: CheckpointWriter, *values: Any, **options: Any) -> None:
        nth = next(waiting, None)
        if nth is not None:
            arm(root, nth, action if nth else Action.COUNT)
        try:
            write(self, *values, **options)
        finally:
            if len(points) > 1:
                disarm()

    CheckpointWriter.write = armed


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def zygote() -> Zygote:
    with Zygote(f"{__name__}:run", timeout=WAIT) as started:
        yield started


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


def start(
    zygote: Zygote, job: Path, folder: Path, *more: str, points: tuple[int, ...] = (), action: int = 0
) -> Outcome:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    arguments = [str(job), f"output.dir={folder}", "engine.timeout_seconds=60", *LAYOUT.overrides, *more]
    return zygote.run(folder / "checkpoints", arguments, free_port(), list(points), action)


def ends_well(outcome: Outcome, where: str = "") -> dict[str, Any]:
    assert outcome.error is None and outcome.value["codes"] == [0] * 4, f"{where}: {outcome}"
    return outcome.value


@pytest.fixture(scope="module")
def whole(job: Path, zygote: Zygote) -> tuple[Path, int]:
    """Return the run without a fault, and the number of operations of its saves."""
    folder = job.parent / "whole"
    operations = ends_well(start(zygote, job, folder))["operations"]
    assert operations > 60
    return folder, operations


def test_killed_in_a_save(job: Path, whole: tuple[Path, int], zygote: Zygote, tmp_path: Path) -> None:
    """Each time a complete checkpoint is found, at most one interval old, and the run ends with the same weights."""
    reference, operations = whole
    resumed_at = set()
    for index in range(POINTS):
        nth = 1 + index * (operations - 1) // (POINTS - 1)
        action = (Action.KILL_BEFORE, Action.KILL_DURING)[index % 2]
        folder = tmp_path / f"run-{index}"
        outcome = start(zygote, job, folder, points=(nth,), action=action)
        where = f"{action.name} at {nth} of {operations}: {outcome.trace[-1:]}"
        assert outcome.killed, where
        reached = max((record["step"] for record in curve(folder)), default=0)
        found = newest_checkpoint(folder / "checkpoints")
        at = found.state.step if found.state else 0
        assert not found.skipped, where
        # The save of step n is under way until the next one, so at most that one is lost.
        saves = [step for step in range(SAVED, STEPS + 1, SAVED) if step <= reached]
        assert at >= ([0, 0, *saves])[-2], f"{where}: reached {reached}, found {at}"
        resumed_at.add(at)
        value = ends_well(start(zygote, job, folder), where)
        assert ("resumed from" in value["said"]) == (at > 0), where
        assert same(tensors(folder), tensors(reference)), where
        assert curve(folder) == curve(reference), where
        shutil.rmtree(folder)
    assert len(resumed_at) >= 3, resumed_at


def test_full_disk_in_twelve_saves(job: Path, whole: tuple[Path, int], zygote: Zygote, tmp_path: Path) -> None:
    """Each of twelve saves in a row meets a full disk, each at a later operation; training continues to its end."""
    longer = (f"train.steps={SAVES}", "output.save_every=1", "train.schedule=constant")
    reference, folder = tmp_path / "reference", tmp_path / "run"
    each = ends_well(start(zygote, job, reference, *longer))["operations"] // SAVES
    # The last operations of a save come after the checkpoint has its name: all of those are tested in one process.
    points = tuple(1 + k * each * 3 // 5 // (SAVES - 2) for k in range(SAVES - 1))
    value = ends_well(start(zygote, job, folder, *longer, points=(*points, 0), action=Action.NO_SPACE))
    assert value["said"].count("NO CHECKPOINT WAS WRITTEN") == SAVES - 1, value["said"]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last", "best", f"step-{SAVES}"}
    assert same(tensors(folder, SAVES), tensors(reference, SAVES))
    assert curve(folder) == curve(reference)
