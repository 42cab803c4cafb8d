"""A checkpoint: an adapter folder as PEFT reads it, the optimiser's state, the trainer's, and a manifest of all."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lowrank_dist.checkpoint.adapter import Adapter, write_adapter_files
from lowrank_dist.checkpoint.atomic import atomic_folder
from lowrank_dist.checkpoint.manifest import verify_manifest, write_manifest
from lowrank_dist.checkpoint.provenance import Provenance
from lowrank_dist.checkpoint.training_state import (
    OPTIMIZER_FILE,
    STATE_FILE,
    TrainingState,
    read_state,
    write_optimizer,
)
from lowrank_dist.errors import UserError

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
    adapter: Adapter,
    provenance: Provenance,
    modules: Collection[str],
    tensors: Mapping[str, Tensor],
    state: TrainingState,
) -> None:
    """Write a checkpoint, all or nothing; one that lies there already is exchanged for it in one step.

    tensors: of `write_optimizer`. Raises UserError for what `write_adapter_files` refuses, DiskError for the disk.
    """
    with atomic_folder(folder, replace=True) as temporary:
        write_adapter_files(temporary, adapter, provenance, modules, trained=True)
        write_optimizer(temporary / OPTIMIZER_FILE, tensors)
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
