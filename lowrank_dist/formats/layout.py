"""Layout of a merged model: the file of each tensor, and Hugging Face's index of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_dist.arch.model_files import model_class
from lowrank_dist.formats.model_folder import FLOAT_DTYPES, INDEX_FILE, SINGLE_FILE
from lowrank_dist.formats.safetensors_file import TensorEntry, read_header
from lowrank_dist.untrusted.json import read_object


@dataclass(frozen=True)
class CopiedTensor:
    """One tensor to copy: `source`, from byte `start` of `path`, is written as `target` (type and size)."""

    path: Path
    start: int
    source: TensorEntry
    target: TensorEntry


@dataclass(frozen=True)
class OutputFile:
    """A file to write; `tensors` are its tensors in the order of their bytes."""

    name: str
    tensors: tuple[CopiedTensor, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class OutputLayout:
    """The files to write.

    read: bytes to read for them, of which `headers` are headers; written: bytes of tensor data to write. mapped: tensor
    name → the base's file to read it from (other files can hold stale copies).
    """

    files: tuple[OutputFile, ...]
    mapped: Mapping[str, Path]
    headers: int
    read: int
    written: int


def plan_layout(mapped: Mapping[str, Path], dtype: str | None, shard_size: int | None) -> OutputLayout:
    """Return the layout of a base's tensors (name → file).

    The files are the base's own, or with `shard_size` new ones of at most so many bytes. dtype: safetensors' name of
    the type that all floating-point tensors get; None keeps each one's own.
    """
    headers = {path: read_header(path) for path in sorted(set(mapped.values()))}
    pieces = {
        path: tuple(
            CopiedTensor(path, header.data_start + entry.start, entry, _converted(entry, dtype))
            for entry in header.entries
        )
        for path, header in headers.items()
    }
    if shard_size is None:
        files = [
            OutputFile(path.name, pieces[path], {**header.metadata, "format": "pt"}) for path, header in headers.items()
        ]
    else:
        ordered = [piece for path in headers for piece in pieces[path] if mapped[piece.source.name] == path]
        shards = pack([piece.target.nbytes for piece in ordered], shard_size)
        names = shard_names(len(shards))
        files = [
            OutputFile(name, tuple(ordered[index] for index in shard), {"format": "pt"})
            for name, shard in zip(names, shards, strict=True)
        ]
    everything = [piece for file in files for piece in file.tensors]
    head = sum(header.data_start for header in headers.values())
    return OutputLayout(
        tuple(files),
        mapped,
        head,
        head + sum(piece.source.nbytes for piece in everything),
        sum(piece.target.nbytes for piece in everything),
    )


def _converted(entry: TensorEntry, dtype: str | None) -> TensorEntry:
    if dtype is None or entry.dtype not in FLOAT_DTYPES:
        return entry
    size = torch.Size(entry.shape).numel() * FLOAT_DTYPES[dtype].itemsize
    return TensorEntry(entry.name, dtype, entry.shape, 0, size)


def pack(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Return the indices of `sizes` in shards of at most `limit`, in order; a larger tensor has a shard to itself.

    As in huggingface_hub's split_state_dict_into_shards_factory, the current shard is continued after an oversized
    tensor.
    """
    shards: list[list[int]] = []
    current: list[int] = []
    room = limit
    for index, size in enumerate(sizes):
        if size > limit:
            shards.append([index])
            continue
        if size > room:
            shards.append(current)
            current, room = [], limit
        current.append(index)
        room -= size
    return [*shards, current] if current else shards


def shard_names(count: int) -> list[str]:
    """Return the file names of `count` shards as in transformers: model.safetensors alone where there is one."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, layout: OutputLayout) -> None:
    """Write the index as transformers' save_pretrained does; none beside a single model.safetensors."""
    if [file.name for file in layout.files] == [SINGLE_FILE]:
        return
    places = {piece.target.name: (file.name, piece.target) for file, piece in _counted(layout)}
    metadata = {
        "total_parameters": sum(torch.Size(entry.shape).numel() for _, entry in places.values()),
        "total_size": sum(entry.nbytes for _, entry in places.values()),
    }
    index = {"metadata": metadata, "weight_map": {name: file for name, (file, _) in places.items()}}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _counted(layout: OutputLayout) -> Iterable[tuple[OutputFile, CopiedTensor]]:
    for file in layout.files:
        for piece in file.tensors:
            if layout.mapped.get(piece.source.name) == piece.path:
                yield file, piece


def write_config(source: Path, target: Path, dtype: str | None) -> list[str]:
    """Copy the config.json of a supported model, and return a line for what was added.

    dtype: replaces its type, under the key it has (transformers 4: torch_dtype, 5: dtype). `architectures` is added
    where it is missing: llama.cpp and vLLM refuse a model without it, transformers does not.
    """
    config = read_object(source, "download the model again")
    changed: dict[str, Any] = {}
    if not config.get("architectures"):
        changed["architectures"] = [model_class(config)]
    if dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        changed.update(dict.fromkeys(keys, str(FLOAT_DTYPES[dtype]).removeprefix("torch.")))
    if not changed:
        target.write_bytes(source.read_bytes())
        return []
    target.write_text(json.dumps(config | changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if "architectures" not in changed:
        return []
    return [f"config.json names {changed['architectures'][0]} as architectures, which {source} lacks"]
