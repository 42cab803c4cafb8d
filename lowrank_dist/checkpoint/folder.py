"""Checkpoint folders: write, verify and find them; copy or export the adapter from one.

A checkpoint holds what was trained in a format that others read, the optimiser's state, the trainer's state, and a
manifest of all its files.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lowrank_dist.checkpoint.training_state import OptimizerWriter, TrainingState, read_state
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import atomic_folder
from lowrank_dist.formats.manifest import (
    OPTIMIZER_FILE,
    STATE_FILE,
    is_checkpoint,
    matches_entry,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from lowrank_dist.formats.paths import detect_removal, require_outside, resolve_link
from lowrank_dist.formats.provenance import PROVENANCE_FILE, read_provenance
from lowrank_dist.formats.text_files import TextFiles, reasons_not_served, text_files
from lowrank_dist.methods.files import VLLM, NotServed, Published, TrainedFiles, own_file
from lowrank_dist.methods.registry import method_package_of, method_package_reading
from lowrank_dist.untrusted.files import LINKS, STEP_NAME

CARD_FILE = "README.md"


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest checkpoint that verifies.

    folder, state: None if there is none. skipped: why newer ones and broken links were passed over.
    """

    folder: Path | None
    state: TrainingState | None
    skipped: tuple[str, ...]


def write_checkpoint(
    folder: Path,
    open_files: Callable[[Path], TrainedFiles],
    shapes: Mapping[str, tuple[int, ...]],
    stream: Iterable[Mapping[str, Tensor]],
    state: TrainingState,
    text: TextFiles | None = None,
) -> None:
    """Write a checkpoint, all or nothing. It replaces an existing one atomically.

    open_files: called with the folder to write in. shapes: stored name → shape of Θ's tensors. stream: these tensors,
    each [3, *shape] in the order of KINDS, a few at a time, in the order of `shapes`. text: the tokenizer and
    generation files saved with it. Raises UserError if the writer of the trained files refuses a tensor, and DiskError
    if a write fails.
    """
    with atomic_folder(folder, replace=True) as temporary:
        files = open_files(temporary)
        with OptimizerWriter(temporary / OPTIMIZER_FILE, shapes) as optimizer:
            for tensors in stream:
                for name, tensor in tensors.items():
                    optimizer.put(tensor)
                    files.put(name, tensor[0])
        files.finish()
        if text is not None:
            text.write(temporary)
        (temporary / STATE_FILE).write_text(state.to_json(), encoding="utf-8")
        write_manifest(temporary)


def read_checkpoint(folder: Path, *, verify: bool = True) -> TrainingState:
    """Verify a checkpoint folder and return its state. verify: compare all files with the manifest as well.

    Raises UserError, naming the file, for a checkpoint that is not as it was written.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a checkpoint (RUN/checkpoints/step-N)")
    if verify:
        verify_manifest(folder)
    for name in (STATE_FILE, OPTIMIZER_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, so this is not a checkpoint of lowrank_dist; take another")
    return read_state(folder / STATE_FILE)


def is_step_folder(path: Path) -> bool:
    """Return True for a path that is named like a checkpoint of a run."""
    return STEP_NAME.fullmatch(path.name) is not None


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Return step → folder checkpoints/step-N, oldest first, without links and other entries."""
    if not checkpoints.is_dir():
        return {}
    found = {
        int(match[1]): path
        for path in checkpoints.iterdir()
        if (match := STEP_NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    }
    return dict(sorted(found.items()))


def step_links(checkpoints: Path) -> list[Path]:
    """Return the links that are named like step folders."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if STEP_NAME.fullmatch(path.name) and path.is_symlink())


def newest_checkpoint(checkpoints: Path, read: Callable[[Path], TrainingState] = read_checkpoint) -> NewestCheckpoint:
    """Return the newest checkpoint that verifies, and the reasons why newer ones do not count.

    read: verifies a checkpoint and returns its state. The links are not used: they may point to an older checkpoint or
    be broken.
    """
    targets = {link: resolve_link(link) for name in LINKS if os.path.lexists(link := checkpoints / name)}
    skipped = [f"{link} is a broken link" for link, target in targets.items() if not target.exists()]
    skipped += [f"{link} is a link; replace it with its folder" for link in step_links(checkpoints)]
    for step, folder in reversed(step_folders(checkpoints).items()):
        try:
            state = read(folder)
            if state.step != step:
                raise UserError(f"{folder} is a copy of step {state.step} under another name")
        except UserError as error:
            skipped.append(str(error))
            continue
        return NewestCheckpoint(folder, state, tuple(skipped))
    return NewestCheckpoint(None, None, tuple(skipped))


def copy_adapter(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy the files of an adapter from a checkpoint to `folder`, replacing an earlier copy. All or nothing.

    Raises UserError where `folder` was not written by lowrank-dist and where the checkpoint does not agree with its
    manifest, DiskError where the disk refuses.
    """
    if folder.exists() and not (folder / PROVENANCE_FILE).is_file():
        raise UserError(
            f"{folder}: not replaced, because it has no {PROVENANCE_FILE} and so was not written by lowrank-dist; "
            "move it away"
        )
    files, manifest = list(names), read_manifest(source)
    missing = [name for name in files if name not in manifest or not (source / name).is_file()]
    if missing:
        raise UserError(f"{source / missing[0]}: missing; take another checkpoint")
    with atomic_folder(folder, replace=True) as temporary:
        for name in files:
            shutil.copyfile(source / name, temporary / name)
            if not matches_entry(temporary / name, manifest[name]):
                raise UserError(f"{source / name}: changed after it was written; take another checkpoint")


def _published(found: Path, name: str, target: str | None, max_rank: int | None) -> Published:
    """Return what to publish of an adapter. Raises NotServed with the reasons of its weights and of its texts."""
    published, reasons = None, list[str]()
    try:
        published = method_package_reading(found).files.publish(found, name, target=target, max_rank=max_rank)
    except NotServed as error:
        reasons += error.reasons
    if target == VLLM:
        provenance = read_provenance(found)
        base = None if provenance is None or not Path(provenance.base).is_dir() else Path(provenance.base)
        reasons += reasons_not_served(found, base, () if provenance is None else provenance.new_ends, target)
    if published is None or reasons:
        raise NotServed(found, str(target), reasons)
    return published


def export(source: Path, out: Path, *, target: str | None = None, max_rank: int | None = None) -> tuple[str, ...]:
    """Write the adapter of `source`, its tokenizer and README.md into the new folder `out`, all or nothing.

    Returns notes on what was changed. target: one of TARGETS, or None to copy the files as they are. For a target, the
    files are written so that it reads the same adapter as PEFT does. An adapter that the target cannot load is refused,
    and for vLLM one whose completions would not end. max_rank: the --max-lora-rank that vLLM is started with.

    Where `source` is a link, such as checkpoints/last of a running job, all files come from the folder that it points
    to at the start. Raises UserError for a run folder, a whole model, an adapter that the reader of its method refuses,
    a malformed provenance, and an `out` that exists or lies in a folder that must not change (`require_outside`);
    FolderRemoved where the run removes the checkpoint meanwhile.
    """
    require_outside(out)
    with detect_removal(source) as found:
        if method_package_of(found) is None and (found / "checkpoints").is_dir():
            raise UserError(
                f"{source}: a run, not a checkpoint; give {source / 'checkpoints' / 'best'} or "
                f"{source / 'checkpoints' / 'last'}"
            )
        manifest = read_manifest(found) if is_checkpoint(found) else {}
        published = _published(found, out.name, target, max_rank)
        # PEFT's own folders have no provenance.
        files = [name for name in published.files if name != PROVENANCE_FILE or (found / name).exists()]
        files += text_files(found)
    with atomic_folder(out) as temporary, detect_removal(found, read_before=True):
        for name in files:
            shutil.copyfile(own_file(found, name), temporary / name)
            if name in manifest and not matches_entry(temporary / name, manifest[name]):
                raise UserError(f"{found / name}: changed while it was copied; export the folder again")
        published.write(temporary)
        (temporary / CARD_FILE).write_text(published.card, encoding="utf-8")
    return published.notes
