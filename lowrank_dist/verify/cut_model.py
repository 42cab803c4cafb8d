"""Writes a model folder cut to some of its layers, with the user's own weights, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import parse_architecture, read_architecture
from lowrank_dist.arch.cut import cut_config, source_names
from lowrank_dist.arch.model_files import CONFIG_FILE, read_config
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import SINGLE_FILE, Checkpoint, check_checkpoint, open_checkpoint, stored_name
from lowrank_dist.formats.safetensors_file import (
    SafetensorsWriter,
    TensorEntry,
    chunks,
    read_header,
    read_into,
    tensor_bytes,
)
from lowrank_dist.model.load import running_dtype

_COPY_BYTES = 16 * 2**20
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class CutModel:
    """A folder with a cut model. layers: their numbers in the whole model. nbytes: of its weights."""

    folder: Path
    layers: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class _Source:
    """The place of one tensor of the cut model in the files of the whole one."""

    file: Path
    start: int
    entry: TensorEntry


def write_cut_model(base: Path, folder: Path, layers: Sequence[int], dtype: str) -> CutModel:
    """Write the model in `base` with only the given layers into the new folder `folder`.

    Embeddings, final norm and output layer are kept. dtype: as in `running_dtype`. The weights are rounded as a run
    rounds them, so that who computes with them in fp32 has the run's weights. Raises UserError for a base whose weights
    do not fit its config.json, and where the disk of `folder` has no room.
    """
    values, architecture = read_config(base), read_architecture(base)
    config = cut_config(values, architecture, layers)
    cut = parse_architecture(config, str(folder / CONFIG_FILE))
    assert cut.layers == tuple(architecture.layers[number] for number in layers), "config.json describes other layers"
    with open_checkpoint(base) as checkpoint:
        check_checkpoint(architecture, checkpoint)
        sources = _sources(checkpoint, architecture, layers)
        rounded = running_dtype(checkpoint, dtype) == torch.bfloat16
    assert sources.keys() <= hf_shapes(cut).keys(), "tensors that the cut model does not have"
    entries = [_entry(name, source.entry, rounded=rounded) for name, source in sources.items()]
    total = sum(entry.nbytes for entry in entries)
    folder.mkdir()
    free = shutil.disk_usage(folder).free
    if free < total:
        raise UserError(
            f"{folder}: one layer of each kind, the embeddings and the output layer take {total / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free; set TMPDIR to a folder with more room"
        )
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with SafetensorsWriter(folder / SINGLE_FILE, entries, {"format": "pt"}) as writer:
        for source, entry in zip(sources.values(), entries, strict=True):
            _copy(source, entry.dtype, writer)
    return CutModel(folder, tuple(layers), total)


def _sources(checkpoint: Checkpoint, architecture: Architecture, layers: Sequence[int]) -> dict[str, _Source]:
    """Return name in the cut model → place of the tensor. A tied output layer that is stored as well is left out."""
    headers = {file: read_header(file) for file in {checkpoint.file(name) for name in checkpoint.names()}}
    places = {
        (file, entry.name): _Source(file, header.data_start + entry.start, entry)
        for file, header in headers.items()
        for entry in header.entries
    }
    found = {}
    for new, old in source_names(architecture, layers).items():
        stored = stored_name(old, architecture, checkpoint)
        assert stored is not None, "check_checkpoint comes first"
        found[new] = places[checkpoint.file(stored), stored]
    return found


def _entry(name: str, entry: TensorEntry, *, rounded: bool) -> TensorEntry:
    if not rounded or entry.dtype not in _DTYPES:
        return replace(entry, name=name)
    return replace(entry, name=name, dtype="BF16", nbytes=entry.nbytes * 2 // _DTYPES[entry.dtype].itemsize)


def _copy(source: _Source, dtype: str, writer: SafetensorsWriter) -> None:
    """Write the tensor in the type `dtype`: its own, or bf16."""
    stored = source.entry
    size = _DTYPES[stored.dtype].itemsize if dtype != stored.dtype else 1
    with source.file.open("rb", buffering=0) as file:
        for first, last in chunks(stored.nbytes // size, _COPY_BYTES // size):
            buffer = bytearray((last - first) * size)
            read_into(file, source.start + first * size, memoryview(buffer))
            if dtype == stored.dtype:
                writer.write(buffer)
            else:
                own = torch.frombuffer(buffer, dtype=_DTYPES[stored.dtype])
                writer.write(tensor_bytes(own.to(_DTYPES[dtype])))
