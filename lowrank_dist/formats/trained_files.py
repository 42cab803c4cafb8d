"""What a method trained as files: the writers' protocol, one for a Θ that is held whole, and copies of an adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import atomic_folder
from lowrank_dist.formats.provenance import PROVENANCE_FILE


class TrainedFiles(Protocol):
    """Writes what a method trained into a folder, as those read it who have no use for an optimiser's state.

    It is given every tensor of Θ, by its stored name, in fp32, one after the other, and told when it has them all.
    `finish` raises UserError for what no one may take for trained weights: nothing, no change, NaN or infinity.
    """

    def put(self, name: str, tensor: Tensor) -> None: ...

    def finish(self) -> None: ...


class Collected:
    """Keeps every tensor, and hands them to `write` at the end."""

    def __init__(self, write: Callable[[Mapping[str, Tensor]], None]) -> None:
        self._write = write
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def finish(self) -> None:
        self._write(self._tensors)


def copy_adapter(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy the files of an adapter out of a checkpoint, in place of what was copied to `folder` before. All or nothing.

    Raises UserError where `folder` holds something else, DiskError for the disk.
    """
    if folder.exists() and not (folder / PROVENANCE_FILE).is_file():
        raise UserError(f"{folder} is not replaced: it holds no {PROVENANCE_FILE}, so lowrank-dist did not write it")
    with atomic_folder(folder, replace=True) as temporary:
        for name in names:
            shutil.copyfile(source / name, temporary / name)
