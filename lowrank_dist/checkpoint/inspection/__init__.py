"""Inspection of folders: adapters, checkpoints, runs and Hugging Face models; what they hold and whether they verify.

Nothing is changed, no pickle is read, and no model is ever held whole.
"""

from pathlib import Path

from lowrank_dist.checkpoint.inspection.run import RUN_ENTRIES, ReadConfig, inspect_run
from lowrank_dist.checkpoint.inspection.trained import inspect_trained
from lowrank_dist.errors import UserError
from lowrank_dist.formats.manifest import is_checkpoint
from lowrank_dist.formats.model_folder import INDEX_FILE, SINGLE_FILE
from lowrank_dist.formats.model_report import inspect_model
from lowrank_dist.formats.report import Report
from lowrank_dist.methods.registry import HOMES, home_of

__all__ = ["Report", "inspect_folder"]

_ADAPTER_CONFIGS = sorted({each.files.published[0] for each in HOMES if each.files.published})
_MODEL_FILES = ("config.json", SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")


def inspect_folder(folder: Path, base: Path | None = None, *, read_config: ReadConfig) -> Report:
    """The report on a folder; what is broken in it is among the report's `problems`, never raised.

    base: the model that an adapter is checked against, in place of the one that it names. read_config: gives every key
    that a run's config.yaml has, or raises ConfigError for what is wrong in it.

    Raises UserError for a path that is no adapter, checkpoint, run or model folder, and for a base that is no folder.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}: give an adapter, checkpoint, run or model folder") from error
    if base is not None and not base.is_dir():
        raise UserError(f"--base {base}: no such folder: give the Hugging Face folder of the base model")
    # A checkpoint of full fine-tuning is a model folder as well.
    home = home_of(folder)
    if home is not None and home.files.published or names & set(_MODEL_FILES) and is_checkpoint(folder):
        return inspect_trained(folder, base)
    # Two of three, so that a run that lost one of them is still told what it lost.
    if len(names & set(RUN_ENTRIES)) >= 2:
        return inspect_run(folder, base, read_config)
    if names & set(_MODEL_FILES):
        if base is not None:
            raise UserError(f"{folder} is a model folder: --base goes with an adapter, a checkpoint or a run")
        return inspect_model(folder)
    raise UserError(
        f"{folder} is no adapter or checkpoint (with {' or '.join(_ADAPTER_CONFIGS)}), no run (with "
        f"{', '.join(RUN_ENTRIES)}) and no Hugging Face model (with config.json): give one of these folders"
    )
