"""Rules for paths: which links are followed, and where nothing may be written.

Nothing is written through a link at the place of a file, or into a folder that must stay as it is (a checkpoint, an
adapter, a model). Links are followed for reading, but a file that is copied out of a folder must lie in that folder, in
another model's, or in the Hub's cache, which links snapshots/<revision>/<file> to ../../blobs/<hash>. A link to a
folder is resolved once, so that all files are read from the same folder. Folders are recognised by file names alone.

A run's links, checkpoints/last and best, are files where the file system has no symbolic links (`point_to`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal, cast

from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import UNSUPPORTED, temporary_name
from lowrank_dist.untrusted.files import follow_file

# The Hub's cache names a blob by its content: git's SHA-1, or SHA-256 of large files.
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)
_CACHED = ("models--", "datasets--", "spaces--")
_MODEL = "a model folder"
# Kind of folder that must stay as it is → groups of file names; a folder of the kind has a file of each group.
_KEPT = {
    "a checkpoint": (("manifest.json",), ("trainer_state.json", "optimizer.safetensors")),
    "an adapter": (
        ("adapter_config.json", "bottleneck_config.json"),
        ("adapter_model.safetensors", "adapter_model.bin", "bottleneck_model.safetensors"),
    ),
    _MODEL: (("config.json",), ("model.safetensors", "model.safetensors.index.json")),
}
# A run has one of these files, and writes into these folders.
_RUN_FILES = ("config.yaml", "metrics.jsonl")
_RUN_FOLDERS = ("checkpoints", "adapter")
_LOOKS = 100  # tries at a link whose target is gone: it may have been moved meanwhile, or lead nowhere


def real_path(path: Path) -> Path:
    """Return the absolute path with all links followed; a circular link stays as it is."""
    return Path(os.path.realpath(path))


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether `path` is `folder` or lies in it, also by way of links or in another letter case."""
    real, home = real_path(path), real_path(folder)
    if real.is_relative_to(home):
        return True
    return home.exists() and any(one.exists() and one.samefile(home) for one in (real, *real.parents))


class FolderRemoved(UserError):
    """A folder was removed, or another one put in its place, while it was read."""


def resolve_link(folder: Path) -> Path:
    """Return the folder that a link leads to at this moment; any other path is returned unchanged.

    Use it before reading several files: a run moves checkpoints/last with every save, and later removes the old target.
    """
    for _ in range(_LOOKS):
        found = real_path(folder) if folder.is_symlink() else follow_file(folder)
        if found.exists():
            break
    return found


def point_to(link: Path, target: Path) -> bool:
    """Move a link of a run to a folder beside it, atomically.

    Returns False where the file system has no symbolic links: the link is then a file with the folder's name. Raises
    OSError where neither can be written.
    """
    temporary = temporary_name(link)
    links = True
    try:
        try:
            temporary.symlink_to(target.name)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            links = False
            temporary.write_text(f"{target.name}\n", encoding="ascii")
        temporary.replace(link)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    return links


@contextmanager
def detect_removal(folder: Path, *, read_before: bool = False) -> Iterator[Path]:
    """Yield the folder after `resolve_link`, to be read in the block.

    If the folder was removed or replaced during the block, FolderRemoved is raised in place of the block's own error.
    read_before: the caller has read the folder before, so FolderRemoved is also raised if it is missing at the start.
    """
    found, descriptor = _opened(folder)
    if descriptor is None:
        if read_before:
            raise _removed(folder, found)
        yield found
        return
    try:
        try:
            yield found
        except Exception as error:
            _require_same(folder, found, descriptor, error)
            raise
        _require_same(folder, found, descriptor, None)
    finally:
        os.close(descriptor)


def _opened(folder: Path) -> tuple[Path, int | None]:
    """Return the folder after `resolve_link` and an open descriptor of it, None where there is no such folder.

    While it is open, a file system that makes up inode numbers keeps this folder's number.
    """
    for _ in range(_LOOKS):
        found = resolve_link(folder)
        with suppress(OSError):
            return found, os.open(found, os.O_PATH)
        if found == folder:
            break
    return found, None


def _require_same(folder: Path, found: Path, descriptor: int, cause: Exception | None) -> None:
    with suppress(OSError):
        if os.path.samestat(os.stat(found), os.fstat(descriptor)):
            return
    raise _removed(folder, found) from cause


def _removed(folder: Path, found: Path) -> FolderRemoved:
    which = f"{found}, the target of {folder}," if found != folder else f"{folder}"
    return FolderRemoved(
        f"{which} was removed or replaced while it was read (a run removes old checkpoints, output.keep_last); try "
        "again"
    )


def require_copyable(path: Path, folder: Path, known: Collection[str] = ()) -> Path:
    """Return `path`, which lies in `folder`, if its content may be copied out of the folder.

    Raises UserError for a link out of the folder, with two exceptions. A link may lead to a file of the Hub's cache, if
    the folder is a snapshot there or was downloaded with links to it. A link may also lead to a file of the same name
    that is one of `known` or lies in a model folder, since people assemble folders from links.
    """
    real = real_path(path)
    if lies_in(real, folder) or _is_cached(real, real_path(folder)):
        return path
    if real.name == path.name and (path.name in known or _kind(real.parent) == _MODEL):
        return path
    raise UserError(
        f"{path}: a link to a file outside its folder ({real}); copy the file into the folder, or remove the link"
    )


def _is_cached(real: Path, folder: Path) -> bool:
    blobs, named = folder.parent.parent / "blobs", _HASH.fullmatch(real.name) is not None
    if folder.parent.name == "snapshots" and real.parent == real_path(blobs):
        # Where blobs itself is a link (to another disk), it may lead anywhere, so the name must be a hash.
        return named or not blobs.is_symlink()
    return named and real.parent.name == "blobs" and real.parent.parent.name.startswith(_CACHED)


def refuse_links(paths: Sequence[Path], what: str) -> None:
    """Raise UserError naming each output path that is a link, a pipe or a device.

    what: the key or option that the paths follow from.
    """
    odd = [f"{path} (a link to {os.readlink(path)})" for path in paths if path.is_symlink()]
    odd += [f"{path} (a pipe or device)" for path in paths if path.exists() and not (path.is_file() or path.is_dir())]
    if odd:
        raise UserError(
            f"{what}: {', '.join(odd)} cannot be written to: only regular files and folders can; replace it, or give "
            "another folder"
        )


def open_without_links(path: Path, mode: Literal["ab", "wb"]) -> BinaryIO:
    """Return the file opened to append (unbuffered) or to overwrite. A link raises OSError (ELOOP)."""
    return cast(BinaryIO, open(path, mode, 0 if mode == "ab" else -1, opener=_not_through_a_link))


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def require_outside(out: Path) -> None:
    """Raise UserError where an output is, or lies in, a folder that must stay as it is or that a run may remove."""
    real = real_path(out)
    # An existing output is not overwritten anyway.
    for folder in real.parents if real.exists() else (real, *real.parents):
        kind = _kind(folder)
        if kind is not None:
            raise UserError(f"{out}: is or lies in {folder}, which is {kind}; give an output path outside it")


def _kind(folder: Path) -> str | None:
    for kind, groups in _KEPT.items():
        if all(any((folder / name).exists() for name in names) for names in groups):
            return kind
    if folder.name in _RUN_FOLDERS and any((folder.parent / name).exists() for name in _RUN_FILES):
        return "a run's own folder"
    return None
