"""Fold a low-rank adapter into its base: W + s·B·A, tensor by tensor, from safetensors to safetensors."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from lowrank_dist.checkpoint.adapter import Adapter, LowRankFactor, read_adapter
from lowrank_dist.checkpoint.atomic import atomic_folder
from lowrank_dist.checkpoint.fingerprint import fingerprint
from lowrank_dist.checkpoint.provenance import PROVENANCE_FILE, read_provenance
from lowrank_dist.checkpoint.safetensors_file import (
    SafetensorsWriter,
    TensorEntry,
    chunks,
    read_header,
    read_into,
    tensor_bytes,
)
from lowrank_dist.errors import UserError
from lowrank_dist.model.architecture import Architecture
from lowrank_dist.model.huggingface import (
    FLOAT_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    load_architecture,
    open_checkpoint,
)
from lowrank_dist.model.load import check_checkpoint

# Elements of a weight in work at a time: about 150 MB of temporaries, whatever the size of the tensor.
_CHUNK_ELEMENTS = 8 * 1024 * 1024
_COPY_BYTES = 16 * 1024 * 1024
# Weights in any other format would be the unmerged ones; an adapter's config would make transformers apply an adapter.
_WEIGHT_SUFFIXES = frozenset(".safetensors .bin .pt .pth .ckpt .h5 .msgpack .onnx .onnx_data .gguf .npz .ot".split())
_NOT_COPIED = frozenset((INDEX_FILE, "pytorch_model.bin.index.json", "adapter_config.json"))

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Update:
    """What is added to one stored tensor: scale·b·a, transposed where the base stores [in, out] (GPT-2)."""

    factor: LowRankFactor
    scale: float
    transposed: bool

    def apply(self, rows: slice, weight: Tensor) -> Tensor:
        """Rows `rows` of the merged tensor from the same rows of the stored one, rounded once to its dtype.

        The sum is formed in fp32 (fp64 for an fp64 base); the product is scaled after it is formed, as PEFT does.
        """
        compute = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.factor.a.to(compute), self.factor.b.to(compute)
        delta = (b @ a[:, rows]).T if self.transposed else b[rows] @ a
        return delta.mul_(self.scale).add_(weight).to(weight.dtype).contiguous()


@dataclass(frozen=True)
class MergeReport:
    """tensors: all in the model; adapted: those with an update; changed: those it changed; nbytes: of all files."""

    tensors: int
    adapted: int
    changed: int
    nbytes: int
    warnings: tuple[str, ...]


def merge(
    base: Path, adapter: Path, out: Path, *, progress: Progress | None = None, force_mismatch: bool = False
) -> MergeReport:
    """Write the base model with the adapter folded in as a plain Hugging Face folder at `out`. All or nothing.

    Same tensors, dtypes and files as the base. Tensors without an update are copied byte by byte, and so is every file
    that holds no weights. Beyond the adapter itself, memory does not grow with the model. Needs no GPU.

    progress: called with (bytes done, bytes in all). force_mismatch: another base than the one trained on is a warning.

    Raises UserError when `out` exists or lies in the base, when base or adapter is incomplete or malformed, when they
    do not belong together (fingerprint, modules, shapes), when nothing would change, and when the disk fails.
    """
    if out.resolve().is_relative_to(base.resolve()):
        raise UserError(f"{out} is or lies in the base folder {base}: give an output path outside it")
    architecture = load_architecture(base)
    with open_checkpoint(base) as checkpoint:
        check_checkpoint(architecture, checkpoint)
        files = {name: checkpoint.file(name) for name in checkpoint.names()}
        low_rank = read_adapter(adapter)
        updates = _updates(architecture, checkpoint, low_rank, adapter)
    warnings = _check_base(base, adapter, force_mismatch)
    others = _other_files(base)
    shards = sorted(set(files.values()))
    meter = _Meter(sum(path.stat().st_size for path in shards), progress)
    with atomic_folder(out) as temporary:
        _check_space(temporary, meter.total)
        for path in others:
            target = temporary / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        changed = sum(_merge_file(path, temporary / path.name, updates, meter) for path in shards)
        if not changed:
            raise UserError(f"{adapter} changes nothing in {base}: its update is zero, or lost in the base's rounding")
        if not (base / SINGLE_FILE).is_file():
            _write_index(temporary, files)
    if changed < len(updates):
        lost = len(updates) - changed
        warnings.append(f"the update of {lost} of {len(updates)} tensors is zero, or lost in the base's rounding")
    return MergeReport(len(files), len(updates), changed, meter.total, tuple(warnings))


def _check_base(base: Path, adapter: Path, force_mismatch: bool) -> list[str]:
    """Warnings about whether the adapter was trained on this base; UserError when it certainly was not."""
    provenance = read_provenance(adapter)
    if provenance is None:
        return [f"{adapter} has no {PROVENANCE_FILE}: that it belongs to {base} is checked by names and shapes alone"]
    found = fingerprint(base)
    if found == provenance.base_fingerprint:
        return []
    mismatch = (
        f"{adapter} was trained on another base than {base} (fingerprint {provenance.base_fingerprint[:12]}… of "
        f"{provenance.base or 'an unnamed model'}, found {found[:12]}…)"
    )
    if force_mismatch:
        return [mismatch]
    raise UserError(f"{mismatch}: give the base that it was trained on, unchanged, config.json included")


def _updates(architecture: Architecture, checkpoint: Checkpoint, adapter: Adapter, folder: Path) -> dict[str, Update]:
    """Stored tensor name → its update; UserError with every factor that has no place in the base."""
    modules = {
        part.path.format(layer=layer)
        for layer in range(architecture.layers)
        for layout in architecture.linears.values()
        for part in layout.parts
    }
    updates, problems = {}, []
    for module, factor in adapter.factors.items():
        name = architecture.find(f"{module}.weight", checkpoint)
        # A tied output layer is the embedding: an update of the one would change the other.
        if name is None or module not in (modules if architecture.tied else modules | {"lm_head"}):
            problems.append(f"{module} is no linear of the base that can be updated on its own")
            continue
        transposed = architecture.conv1d and module in modules
        shape = (factor.b.size(0), factor.a.size(1))
        stored = checkpoint.shape(name)
        if shape != (stored[::-1] if transposed else stored):
            problems.append(
                f"{module} has an update [out, in] = {list(shape)}, but {name} in the base is {list(stored)}"
            )
            continue
        updates[name] = Update(factor, factor.scale(adapter.rslora), transposed)
    if problems:
        raise UserError(
            f"{folder} does not fit the base {checkpoint.path}: {'; '.join(problems[:5])} ({len(problems)} in all)"
        )
    if not any(update.scale and update.factor.a.any() and update.factor.b.any() for update in updates.values()):
        raise UserError(f"{folder} changes nothing: s·B·A is zero in every module (an untrained adapter?)")
    return updates


@dataclass
class _Meter:
    """Counts bytes and tells the caller's progress function."""

    total: int
    progress: Progress | None
    done: int = field(default=0, init=False)

    def advance(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


def _merge_file(source: Path, target: Path, updates: Mapping[str, Update], meter: _Meter) -> int:
    """Write one file of the base merged, in the same order of tensors; returns how many tensors an update changed."""
    header = read_header(source)
    meter.advance(header.data_start)
    changed = 0
    with (
        source.open("rb", buffering=0) as file,
        SafetensorsWriter(target, header.entries, {**header.metadata, "format": "pt"}) as writer,
    ):
        for entry in header.entries:
            start = header.data_start + entry.start
            if entry.name in updates:
                changed += _merge_tensor(file, start, entry, updates[entry.name], writer, meter)
                continue
            for first, last in chunks(entry.nbytes, _COPY_BYTES):
                buffer = bytearray(last - first)
                read_into(file, start + first, memoryview(buffer))
                writer.write(buffer)
                meter.advance(len(buffer))
    return changed


def _merge_tensor(
    file: FileIO, start: int, entry: TensorEntry, update: Update, writer: SafetensorsWriter, meter: _Meter
) -> bool:
    rows, columns = entry.shape
    row_bytes = entry.nbytes // rows
    changed = False
    for first, last in chunks(rows, max(1, _CHUNK_ELEMENTS // columns)):
        buffer = bytearray((last - first) * row_bytes)
        read_into(file, start + first * row_bytes, memoryview(buffer))
        weight = torch.frombuffer(buffer, dtype=FLOAT_DTYPES[entry.dtype]).view(last - first, columns)
        merged = update.apply(slice(first, last), weight)
        # NaN and infinity show in the extremes, which are found 40 times faster than by isfinite.
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(merged)):
            raise UserError(
                f"{file.name}: {entry.name} would hold NaN or infinity: base and adapter do not fit together"
            )
        changed = changed or not torch.equal(merged, weight)
        writer.write(tensor_bytes(merged))
        meter.advance(len(buffer))
    return changed


def _other_files(base: Path) -> list[Path]:
    """Every file of the base that holds no weights, subfolders included, hidden folders and links to folders not."""
    found = []
    for parent, folders, names in os.walk(base):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if path.suffix in _WEIGHT_SUFFIXES or name in _NOT_COPIED:
                continue
            if not path.is_file():
                raise UserError(
                    f"{path} cannot be copied, it is no regular file (a broken link?): remove or restore it"
                )
            found.append(path)
    return sorted(found)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent} has {free >> 20} MB free, the merged model needs {needed >> 20} MB: make room"
        )


def _write_index(folder: Path, files: Mapping[str, Path]) -> None:
    """The index as transformers' save_pretrained writes it."""
    entries = [entry for path in sorted(set(files.values())) for entry in read_header(folder / path.name).entries]
    metadata = {
        "total_parameters": sum(torch.Size(entry.shape).numel() for entry in entries if entry.name in files),
        "total_size": sum(entry.nbytes for entry in entries if entry.name in files),
    }
    index = {"metadata": metadata, "weight_map": {name: path.name for name, path in files.items()}}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
