"""Merge low-rank adapters into their base: W + Σ w·s·B·A, tensor by tensor, from safetensors to safetensors."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.model_files import class_note
from lowrank_dist.backend.libraries import allow_no_temporary_folder
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import atomic_folder
from lowrank_dist.formats.layout import CopiedTensor, OutputFile, plan_layout, write_config, write_index
from lowrank_dist.formats.model_folder import FLOAT_DTYPES, check_checkpoint, open_checkpoint, other_files
from lowrank_dist.formats.paths import detect_removal, resolve_link
from lowrank_dist.formats.provenance import PROVENANCE_FILE, merged_provenance
from lowrank_dist.formats.safetensors_file import SafetensorsWriter, chunks, read_into, tensor_bytes
from lowrank_dist.formats.text_files import merged_text_files
from lowrank_dist.merging.checks import (
    check_bases,
    note_on_no_tokenizer,
    require_distinct,
    require_output,
    require_space,
)
from lowrank_dist.merging.options import SAME_AS_BASE, OutputFormat, WeightedAdapter
from lowrank_dist.merging.update import Update, build_updates
from lowrank_dist.methods.lora.extras import require_copies
from lowrank_dist.methods.lora.files import read_adapter
from lowrank_dist.methods.lora.folder import FILES
from lowrank_dist.methods.registry import method_package_reading

if TYPE_CHECKING:
    from lowrank_dist.merging.verify import Verification, Verifier

# Elements of a weight merged at a time: temporaries stay below 250 MB whatever the size of the tensor.
_CHUNK_ELEMENTS = 8 * 1024 * 1024
_COPY_BYTES = 16 * 1024 * 1024

Progress = Callable[[int, int], None]
AdapterFolder = str | Path | WeightedAdapter


@dataclass(frozen=True)
class AdapterReport:
    """The effect of one adapter on a merge.

    adapted: number of tensors that the adapter has factors for. changed: number of those that would be stored with
    other values without the adapter.
    """

    adapter: WeightedAdapter
    adapted: int
    changed: int


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    tensors: number in the model. adapted: number with an update. changed: number stored with other values than in the
    base. nbytes: of all weight files. warnings: possible mistakes. notes: changes to the files beside the weights.
    verification: the comparison with PEFT; None where it was not asked for.
    """

    tensors: int
    adapted: int
    changed: int
    nbytes: int
    adapters: tuple[AdapterReport, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    verification: "Verification | None" = None


def merge(
    base: str | Path,
    adapters: AdapterFolder | Sequence[AdapterFolder],
    out: str | Path,
    *,
    progress: Progress | None = None,
    force_mismatch: bool = False,
    output_format: OutputFormat = SAME_AS_BASE,
    verify: Callable[[str], None] | None = None,
    verify_text: Path | None = None,
) -> MergeReport:
    """Write the base model with the adapters merged in as a plain Hugging Face folder at `out`. All or nothing.

    Tensors without an update and all other files are copied byte by byte, with three exceptions: tokenizer files come
    from the adapters where they bring a tokenizer, eos_token_id also gets the tokens that the adapters were trained to
    end texts with (`merged_text_files`), and config.json gets the `architectures` that it lacks (`write_config`).
    lowrank_dist.json is `merged_provenance`. Memory use beyond the adapters does not grow with the model.

    base: Hugging Face folder. adapters: one PEFT adapter folder or several, with weights w other than 1 as
    `WeightedAdapter`; ΔW = Σ w·s·B·A is summed and then rounded once (s: the scale of an adapter). progress: called
    with (bytes done, bytes in all). force_mismatch: only warn where the adapters were trained on another base.
    output_format: shards, dtype and tokenizer of the result. verify: if given, the result's logits are compared with
    base + adapters in PEFT before the result gets its name. This loads the model whole, in fp32. `verify` is called
    with the name of each stage as the stage begins. verify_text: file whose first lines are the sample; None for
    built-in text.

    Raises UserError, and leaves nothing behind, when `out` exists or lies in a folder that must not change
    (`require_output`), when a file to copy is a link out of the base, when base or adapter is incomplete or malformed,
    when they do not belong together (fingerprint, modules, shapes), when a folder holds no low-rank update, when the
    adapters bring different tokenizers, when nothing would change, when a value becomes NaN or infinity in the output,
    when the verification fails, and when the disk fails; FolderRemoved when a run removes an adapter while it is read.
    """
    base, out = resolve_link(Path(base)), Path(out)
    weighted = _weighted(adapters)
    require_distinct(weighted)
    require_output(out, base)
    for adapter in weighted:
        method_package_reading(adapter.path).files.refuse_merge(adapter.path)
    verifier = _verifier(base, weighted, verify, verify_text)
    architecture = read_architecture(base)
    with ExitStack() as held:
        checkpoint = held.enter_context(open_checkpoint(base))
        check_checkpoint(architecture, checkpoint)
        for adapter in weighted:
            held.enter_context(detect_removal(adapter.path))
        mapped = {name: checkpoint.file(name) for name in checkpoint.names()}
        read = [(adapter.path, adapter.weight, read_adapter(adapter.path, architecture)) for adapter in weighted]
        for adapter in weighted:
            require_copies(adapter.path, base)
        updates = build_updates(architecture, checkpoint, read)
        warnings = [note for adapter in weighted for note in FILES.notes(adapter.path)]
        warnings += check_bases(base, weighted, force_mismatch)
        text = merged_text_files([adapter.path for adapter in weighted], output_format.tokenizer, architecture.vocab)
        origin = merged_provenance(base, {adapter.path: adapter.weight for adapter in weighted})
    text_notes = text.changes(base)  # before its files are copied, so that an error names the base's own
    others, dtype = other_files(base), output_format.dtype
    layout = plan_layout(mapped, dtype, output_format.shard_size)
    meter = _Meter(layout.read, progress)
    changes = _Changes()
    with atomic_folder(out) as temporary:
        require_space(temporary, layout.written)
        for path in others:
            target = temporary / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        added = write_config(base / "config.json", temporary / "config.json", dtype)
        warnings += [] if added else class_note(base)
        text.write(temporary)
        warnings += note_on_no_tokenizer(temporary, base)
        if origin is not None:
            (temporary / PROVENANCE_FILE).write_text(origin.to_json(), encoding="utf-8")
        meter.advance(layout.headers)
        for file in layout.files:
            _write_file(file, temporary / file.name, updates, changes, meter)
        if not changes.tensors:
            which = ", ".join(str(adapter.path) for adapter in weighted)
            raise UserError(
                f"{which}: changes nothing in {base}, because its update is zero or lost in {_rounding(dtype)}; "
                "train longer"
            )
        write_index(temporary, layout)
        nbytes = sum((temporary / file.name).stat().st_size for file in layout.files)
        verification = None
        if verify is not None and verifier is not None:
            verify("loading base, adapters and merged model whole, in fp32")
            verification = verifier(temporary)
    reports = tuple(_report(index, adapter, updates, changes) for index, adapter in enumerate(weighted))
    for report in reports:
        if not report.changed:
            warnings.append(
                f"{report.adapter.path}: changes nothing, because its update is zero or lost in {_rounding(dtype)}"
            )
        elif report.changed < report.adapted:
            lost = f"{report.adapted - report.changed} of {report.adapted} tensors"
            warnings.append(f"{report.adapter.path}: the update of {lost} is zero, or lost in {_rounding(dtype)}")
    return MergeReport(
        tensors=len(mapped),
        adapted=len(updates),
        changed=len(changes.tensors),
        nbytes=nbytes,
        adapters=reports,
        warnings=tuple(warnings),
        notes=(*added, *text_notes),
        verification=verification,
    )


def _weighted(adapters: AdapterFolder | Sequence[AdapterFolder]) -> tuple[WeightedAdapter, ...]:
    """Return the adapters with their weights. Links are resolved once, for the merge and for its verification."""
    several = (adapters,) if isinstance(adapters, str | Path | WeightedAdapter) else adapters
    weighted = (each if isinstance(each, WeightedAdapter) else WeightedAdapter(Path(each)) for each in several)
    return tuple(replace(adapter, path=resolve_link(adapter.path)) for adapter in weighted)


def _verifier(
    base: Path, adapters: Sequence[WeightedAdapter], verify: Callable[[str], None] | None, text: Path | None
) -> "Verifier | None":
    """Return the check of the result, None where none is asked for. It needs transformers, which a merge does not."""
    if verify is None:
        if text is not None:
            raise UserError("--verify-text says what --verify reads: add --verify")
        return None
    allow_no_temporary_folder()
    from lowrank_dist.merging.verify import Verifier

    return Verifier(base, adapters, text)


def _rounding(dtype: str | None) -> str:
    return "the rounding to the base's dtype" if dtype is None else f"the rounding to {dtype}"


@dataclass
class _Meter:
    """Counts bytes and calls the caller's progress function."""

    total: int
    progress: Progress | None
    done: int = field(default=0, init=False)

    def advance(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


@dataclass
class _Changes:
    """The changes by a merge. tensors: names of those that differ from the base as stored.

    parts: (name of the tensor, index of the adapter) where the adapter made a difference.
    """

    tensors: set[str] = field(default_factory=set)
    parts: set[tuple[str, int]] = field(default_factory=set)


def _report(index: int, adapter: WeightedAdapter, updates: Mapping[str, Update], changes: _Changes) -> AdapterReport:
    adapted = [name for name, update in updates.items() if any(term.adapter == index for term in update.terms)]
    return AdapterReport(adapter, len(adapted), sum((name, index) in changes.parts for name in adapted))


def _write_file(
    output: OutputFile, target: Path, updates: Mapping[str, Update], changes: _Changes, meter: _Meter
) -> None:
    """Write one file, reading each tensor from the file of the base that holds it. One base file is open at a time."""
    entries = [piece.target for piece in output.tensors]
    with SafetensorsWriter(target, entries, output.metadata) as writer, ExitStack() as opened:
        path, source = None, None
        for piece in output.tensors:
            if source is None or piece.path != path:
                opened.close()
                path, source = piece.path, opened.enter_context(piece.path.open("rb", buffering=0))
            if piece.source.name in updates:
                _merge_tensor(source, piece, updates[piece.source.name], changes, writer, meter)
            elif piece.source.dtype != piece.target.dtype:
                _convert_tensor(source, piece, writer, meter)
            else:
                for first, last in chunks(piece.source.nbytes, _COPY_BYTES):
                    writer.write(_read(source, piece, first, last))
                    meter.advance(last - first)


def _read(file: FileIO, piece: CopiedTensor, first: int, last: int) -> bytearray:
    buffer = bytearray(last - first)
    read_into(file, piece.start + first, memoryview(buffer))
    return buffer


def _merge_tensor(
    file: FileIO, piece: CopiedTensor, update: Update, changes: _Changes, writer: SafetensorsWriter, meter: _Meter
) -> None:
    name, (rows, columns) = piece.source.name, piece.source.shape
    row_bytes = piece.source.nbytes // rows
    dtype = FLOAT_DTYPES[piece.target.dtype]
    for first, last in chunks(rows, rows if update.takes_all_rows else max(1, _CHUNK_ELEMENTS // columns)):
        buffer = _read(file, piece, first * row_bytes, last * row_bytes)
        weight = torch.frombuffer(buffer, dtype=FLOAT_DTYPES[piece.source.dtype]).view(last - first, columns)
        chosen = slice(first, last)
        merged = update.apply(chosen, weight, dtype)
        if not _finite(merged):
            raise UserError(
                f"{piece.path}: {name} would have NaN or infinity as {piece.target.dtype}; check that the adapter "
                "belongs to this base, or give a wider --dtype"
            )
        if name not in changes.tensors and not torch.equal(merged, weight.to(dtype)):
            changes.tensors.add(name)
        for term in update.terms:
            part = (name, term.adapter)
            # Mostly only for the first chunk: once a part made a difference it is not checked again.
            if part not in changes.parts and not torch.equal(
                merged, update.apply(chosen, weight, dtype, without=term.adapter)
            ):
                changes.parts.add(part)
        writer.write(tensor_bytes(merged))
        meter.advance(len(buffer))


def _convert_tensor(file: FileIO, piece: CopiedTensor, writer: SafetensorsWriter, meter: _Meter) -> None:
    stored, dtype = FLOAT_DTYPES[piece.source.dtype], FLOAT_DTYPES[piece.target.dtype]
    for first, last in chunks(piece.source.nbytes // stored.itemsize, _CHUNK_ELEMENTS):
        buffer = _read(file, piece, first * stored.itemsize, last * stored.itemsize)
        weight = torch.frombuffer(buffer, dtype=stored)
        converted = weight.to(dtype)
        # Infinities of the base itself are kept.
        if not _finite(converted) and bool((converted.isinf() & weight.isfinite()).any()):
            raise UserError(
                f"{piece.path}: {piece.source.name} would have infinity as {piece.target.dtype}, since its largest "
                f"magnitude is {weight[weight.isfinite()].abs().max():g}; give a wider --dtype"
            )
        writer.write(tensor_bytes(converted))
        meter.advance(len(buffer))


def _finite(tensor: Tensor) -> bool:
    # NaN and infinity show in minimum and maximum; finding these is 40 times faster than isfinite.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
