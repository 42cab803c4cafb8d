"""A checkpoint: what was trained as others read it, the optimiser's state, the trainer's, and a manifest of all."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lowrank_dist.checkpoint.training_state import OptimizerWriter, TrainingState, read_state
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import atomic_folder
from lowrank_dist.formats.manifest import OPTIMIZER_FILE, STATE_FILE, verify_manifest, write_manifest
from lowrank_dist.formats.trained_files import TrainedFiles

_STEP = re.compile(r"step-([1-9]\d*)", re.ASCII)
LINKS = ("last", "best")


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, or None; passed_over: why each newer one, and each link, does not count."""

    folder: Path | None
    state: TrainingState | None
    passed_over: tuple[str, ...]


def write_checkpoint(
    folder: Path,
    open_files: Callable[[Path], TrainedFiles],
    shapes: Mapping[str, tuple[int, ...]],
    stream: Iterable[Mapping[str, Tensor]],
    state: TrainingState,
) -> None:
    """Write a checkpoint, all or nothing; one that lies there already is exchanged for it in one step.

    open_files: given the folder to write in. shapes: stored name → shape of Θ's tensors. stream: these tensors, each
    [3, *shape] in the order of KINDS, a few at a time, in the order of `shapes`. Raises UserError for what the trained
    files refuse, DiskError for the disk.
    """
    with atomic_folder(folder, replace=True) as temporary:
        files = open_files(temporary)
        with OptimizerWriter(temporary / OPTIMIZER_FILE, shapes) as optimizer:
            for tensors in stream:
                for name, tensor in tensors.items():
                    optimizer.put(tensor)
                    files.put(name, tensor[0])
        files.finish()
        (temporary / STATE_FILE).write_text(state.to_json(), encoding="utf-8")
        write_manifest(temporary)


def read_checkpoint(folder: Path) -> TrainingState:
    """Verify a checkpoint folder and read its state; UserError, naming the file, for one that is not as written."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give a checkpoint (RUN/checkpoints/step-N)")
    verify_manifest(folder)
    for name in (STATE_FILE, OPTIMIZER_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: this is no checkpoint of lowrank_dist, take another")
    return read_state(folder / STATE_FILE)


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Step → folder checkpoints/step-N, oldest first; links and anything else are not among them."""
    if not checkpoints.is_dir():
        return {}
    found = {
        int(match[1]): path
        for path in checkpoints.iterdir()
        if (match := _STEP.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    }
    return dict(sorted(found.items()))


def newest_checkpoint(checkpoints: Path) -> Found:
    """Look from the newest step backwards. The links are not trusted: they may be older, or lead nowhere."""
    links = (checkpoints / name for name in LINKS)
    passed_over = [f"{link} leads nowhere" for link in links if link.is_symlink() and not link.exists()]
    for step, folder in reversed(step_folders(checkpoints).items()):
        try:
            state = read_checkpoint(folder)
            if state.step != step:
                raise UserError(f"{folder} holds step {state.step}: it is a copy under another name")
        except UserError as error:
            passed_over.append(str(error))
            continue
        return Found(folder, state, tuple(passed_over))
    return Found(None, None, tuple(passed_over))
