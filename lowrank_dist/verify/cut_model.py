"""Writes a model folder cut to some of its layers, with the user's own weights, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_dist.arch.config_json import parse_architecture, read_architecture
from lowrank_dist.arch.cut import cut_config, source_names
from lowrank_dist.arch.model_files import CONFIG_FILE, read_config
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import SINGLE_FILE, check_checkpoint, open_checkpoint, stored_name
from lowrank_dist.formats.safetensors_file import SafetensorsWriter, TensorEntry, chunks, read_header, read_into

_COPY_BYTES = 16 * 2**20


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


def write_cut_model(base: Path, folder: Path, layers: Sequence[int]) -> CutModel:
    """Write the model in `base` with only the given layers into the new folder `folder`.

    Embeddings, final norm and output layer are kept, and every tensor its type. Raises UserError for a base whose
    weights do not fit its config.json, and where the disk of `folder` has no room.
    """
    values, architecture = read_config(base), read_architecture(base)
    config = cut_config(values, architecture, layers)
    cut = parse_architecture(config, str(folder / CONFIG_FILE))
    assert cut.layers == tuple(architecture.layers[number] for number in layers), "config.json describes other layers"
    sources = _sources(base, layers)
    assert sources.keys() <= hf_shapes(cut).keys(), "tensors that the cut model does not have"
    total = sum(source.entry.nbytes for source in sources.values())
    folder.mkdir()
    free = shutil.disk_usage(folder).free
    if free < total:
        raise UserError(
            f"{folder}: one layer of each kind, the embeddings and the output layer take {total / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free; set TMPDIR to a folder with more room"
        )
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    entries = [replace(source.entry, name=name) for name, source in sources.items()]
    with SafetensorsWriter(folder / SINGLE_FILE, entries, {"format": "pt"}) as writer:
        for source in sources.values():
            _copy(source, writer)
    return CutModel(folder, tuple(layers), total)


def _sources(base: Path, layers: Sequence[int]) -> dict[str, _Source]:
    """Return name in the cut model → place of the tensor. A tied output layer that is stored as well is left out."""
    architecture, found = read_architecture(base), {}
    with open_checkpoint(base) as checkpoint:
        check_checkpoint(architecture, checkpoint)
        headers = {file: read_header(file) for file in {checkpoint.file(name) for name in checkpoint.names()}}
        places = {
            (file, entry.name): _Source(file, header.data_start + entry.start, entry)
            for file, header in headers.items()
            for entry in header.entries
        }
        for new, old in source_names(architecture, layers).items():
            stored = stored_name(old, architecture, checkpoint)
            assert stored is not None, "check_checkpoint comes first"
            found[new] = places[checkpoint.file(stored), stored]
    return found


def _copy(source: _Source, writer: SafetensorsWriter) -> None:
    with source.file.open("rb", buffering=0) as file:
        for first, last in chunks(source.entry.nbytes, _COPY_BYTES):
            buffer = bytearray(last - first)
            read_into(file, source.start + first, memoryview(buffer))
            writer.write(buffer)
