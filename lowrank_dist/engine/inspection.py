"""The inspection of a folder together with the config of a run, which `checkpoint.inspection` does not know."""

from __future__ import annotations

from pathlib import Path

from lowrank_dist.checkpoint.inspection import inspect_folder
from lowrank_dist.config import load_config
from lowrank_dist.formats.report import Report


def inspect(path: str | Path, base: str | Path | None = None) -> Report:
    """Return the report on an adapter, checkpoint, run or Hugging Face model folder. Changes nothing, reads no pickle.

    Faults in what the folder holds are the report's `problems` and are never raised. base: the model to check an
    adapter against; None for the one that it names.

    Raises UserError for a path that is none of these folders, for a base that is no folder, and for a folder that is
    removed while it is read.
    """
    against = None if base is None else Path(base)
    return inspect_folder(Path(path), against, read_config=lambda file: load_config(file).read_keys())
