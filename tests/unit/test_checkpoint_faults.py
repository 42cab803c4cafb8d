"""SIGKILL and a full disk at every operation of a save: a complete checkpoint to resume from always remains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowrank_dist.checkpoint.folder import newest_checkpoint, read_checkpoint, step_folders
from lowrank_dist.checkpoint.training_state import TrainingState
from lowrank_dist.engine.checkpoint_writer import CheckpointWriter, Facts, Retention
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.formats.manifest import MANIFEST_FILE, OPTIMIZER_FILE
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance
from lowrank_dist.methods.files import CONFIG_FILE, WEIGHTS_FILE
from lowrank_dist.methods.lora.files import read_adapter
from tests.faults import Action, Zygote
from tests.unit.test_checkpoint_folder import MODULES, SHAPES, lora_files, tensors_of
from tests.unit.test_checkpoint_folder import state_of as whole_state

pytestmark = pytest.mark.slow

OLD, NEW = 2, 4


def state_of(step: int) -> TrainingState:
    """Return a state that was evaluated at every step, each time with a lower loss."""
    return whole_state(step).model_copy(update={"eval_losses": {at: 2.0 / at for at in range(1, step + 1)}})


class StandIn:
    """The attributes of a method that saving needs."""

    published = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)
    files = staticmethod(lora_files)


def save_final_checkpoint(root: Path, step: int, resumed: int | None) -> None:
    """Save the final checkpoint of a run that keeps one, so that every operation of a save happens."""
    facts = Facts(Provenance("cd" * 32, "base", {}), state_of(step).data, None)
    folder = RunFolder(root)
    folder.checkpoints.mkdir(exist_ok=True)
    resumed_state = state_of(resumed) if resumed else None
    writer = CheckpointWriter(folder, StandIn(), SHAPES, facts, Retention(1, 1, "loss"), resumed_state)
    writer.write([tensors_of(step)], state_of(step), final=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two runs: one saved at step 2 and, for comparison, one at step 4."""
    place = tmp_path_factory.mktemp("saved")
    for step in (OLD, NEW):
        (place / str(step)).mkdir()
        save_final_checkpoint(place / str(step), step, None)
    return place


@pytest.fixture(scope="module")
def zygote() -> Zygote:
    with Zygote(f"{__name__}:save_final_checkpoint") as zygote:
        yield zygote


def copy_saved_run(saved: Path, place: Path) -> Path:
    """Copy the run whose last checkpoint is that of step 2."""
    return Path(shutil.copytree(saved / str(OLD), place, symlinks=True))


def same(folder: Path, other: Path) -> bool:
    return (folder / OPTIMIZER_FILE).read_bytes() == (other / OPTIMIZER_FILE).read_bytes()


def require_promise(saved: Path, root: Path, where: str) -> int:
    """Check that a complete checkpoint of this or the previous save exists, and that links and adapter are whole."""
    found = newest_checkpoint(root / "checkpoints")
    assert found.state is not None and not found.skipped, f"{where}: {found.skipped}"
    assert same(found.folder, saved / str(found.state.step) / "checkpoints" / f"step-{found.state.step}"), where
    for name in ("last", "best"):
        assert read_checkpoint(root / "checkpoints" / name).step in (OLD, NEW), where
    assert read_adapter(root / "adapter").factors.keys() == set(MODULES), where
    return found.state.step


def require_recovery(saved: Path, root: Path, step: int, where: str) -> None:
    """Check that the run resumes from there, ends as if it had not been interrupted, and leaves nothing over."""
    RunFolder(root).log(1)  # done by another rank: creates the folders
    RunFolder(root)._clear()
    save_final_checkpoint(root, NEW, step)
    assert require_promise(saved, root, where) == NEW
    assert {path.name for path in (root / "checkpoints").iterdir()} == {"last", "best", f"step-{NEW}"}, where
    assert same(root / "checkpoints/last", saved / f"{NEW}/checkpoints/step-{NEW}")


@pytest.mark.parametrize("action", [Action.KILL_BEFORE, Action.KILL_DURING, Action.NO_SPACE, Action.NO_SPACE_ONCE])
def test_at_every_operation(saved: Path, zygote: Zygote, tmp_path: Path, action: Action) -> None:
    plain = zygote.run(copy_saved_run(saved, tmp_path / "plain"), NEW, OLD)
    assert plain.error is None and plain.count > 40, plain.traceback
    kinds = {line.split()[0] for line in plain.trace}
    assert {"write", "fsync", "rename", "symlink", "mkdir", "unlink"} <= kinds, kinds
    steps = set()
    for nth in range(1, plain.count + 1):
        root = copy_saved_run(saved, tmp_path / f"{action.name}-{nth}")
        outcome = zygote.run(root, NEW, OLD, nth=nth, action=action)
        where = f"{action.name} at {nth}: {outcome.trace[-1]}"
        if action in (Action.KILL_BEFORE, Action.KILL_DURING):
            assert outcome.killed, where
        elif outcome.error is not None:
            assert "DiskError" in outcome.classes, f"{where}: {outcome.error} {outcome.traceback}"
        step = require_promise(saved, root, where)
        steps.add(step)
        require_recovery(saved, root, step, where)
        shutil.rmtree(root)
    assert steps == {OLD, NEW}, "some points lie before the new checkpoint has its name and some after"


def test_the_promise_can_be_broken(saved: Path, tmp_path: Path) -> None:
    """The control: what an in-place writer leaves fails the checks above."""
    root = copy_saved_run(saved, tmp_path / "run")
    half = root / "checkpoints" / f"step-{NEW}"
    shutil.copytree(saved / f"{NEW}/checkpoints/step-{NEW}", half, ignore=shutil.ignore_patterns(MANIFEST_FILE))
    with pytest.raises(AssertionError, match="manifest"):
        require_promise(saved, root, "in place")
    assert list(step_folders(root / "checkpoints")) == [OLD, NEW]
