"""The model that is planned: its architecture, a name for it, and the element type of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import architecture_of
from lowrank_dist.arch.model_files import BUILT_IN, config_file, declared_dtype, find_config, read_config, stored_dtype


@dataclass(frozen=True)
class Model:
    """name: of a built-in shape, or of the model's folder. dtype: of the published weights; fp16 runs as bf16."""

    name: str
    architecture: Architecture
    dtype: Literal["fp32", "bf16"]


def find_model(what: str) -> Model:
    """The model of a built-in shape, a model folder or a config.json. UserError for anything else."""
    file = find_config(what)
    return read_model(file, what if what in BUILT_IN else None)


def read_model(path: Path, name: str | None = None) -> Model:
    """The model of a folder, or of a config.json and the weights beside it. name: the folder's where it is None."""
    file = config_file(path)
    values = read_config(file)
    dtype = stored_dtype(file.parent) or declared_dtype(values)
    return Model(name or file.parent.name, architecture_of(values, str(file)), dtype)
