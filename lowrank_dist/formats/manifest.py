"""manifest.json: size and SHA-256 of each file of a checkpoint. Written last: without it there is no checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.files import read_bytes
from lowrank_dist.untrusted.json import JsonError, parse_json

MANIFEST_FILE = "manifest.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
_FORMAT = 1
_LARGEST_MANIFEST = 1 << 20
_ANOTHER = "take another checkpoint"


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file in the folder, which must hold files only."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST_FILE).write_text(_text(files), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return file → its size and SHA-256 as written. Raises UserError for a missing, malformed or changed manifest.

    The manifest has one canonical form and carries its own digest, so that a change of any byte in it is detected.
    """
    path = folder / MANIFEST_FILE
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: missing, so the checkpoint is incomplete; {_ANOTHER}")
    try:
        text = read_bytes(path, _ANOTHER, largest=_LARGEST_MANIFEST)
        files = parse_json(text)["files"]
        genuine = text == _text(files).encode() and all(
            entry.keys() == {"size", "sha256"} and isinstance(entry["size"], int) and isinstance(entry["sha256"], str)
            for entry in files.values()
        )
    except (JsonError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not in the format that lowrank_dist writes ({error}); {_ANOTHER}") from error
    if not genuine:
        raise UserError(f"{path}: changed after it was written; {_ANOTHER}")
    return files


def verify_manifest(folder: Path) -> None:
    """Raise UserError, naming the file, unless the folder holds exactly the regular files that its manifest lists."""
    files = read_manifest(folder)
    found = {child.name for child in folder.iterdir()} - {MANIFEST_FILE}
    for what, names in (("missing", files.keys() - found), ("not in the manifest", found - files.keys())):
        if names:
            raise UserError(
                f"{folder / min(names)}: {what}, so the checkpoint changed after it was written; {_ANOTHER}"
            )
    for name, expected in files.items():
        child = folder / name
        if child.is_symlink() or not child.is_file():
            raise UserError(f"{child}: not a regular file; {_ANOTHER}")
        # The size first: a truncated file is found without hashing it.
        if child.stat().st_size != expected["size"]:
            raise UserError(f"{child}: {child.stat().st_size} bytes, the manifest has {expected['size']}; {_ANOTHER}")
        try:
            damaged = not matches_entry(child, expected)
        except OSError as error:
            raise UserError(f"{child}: cannot be read ({error.strerror}); {_ANOTHER}") from error
        if damaged:
            raise UserError(f"{child}: damaged, its SHA-256 is not the one in the manifest; {_ANOTHER}")


def matches_entry(path: Path, expected: object) -> bool:
    """Return whether a file has the size and SHA-256 of its entry in a manifest."""
    return _describe(path) == expected


def _describe(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _text(files: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"format": _FORMAT, "sha256": digest, "files": files}, indent=2, sort_keys=True) + "\n"


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, complete or not: it has a file that a plain adapter does not have."""
    return any((folder / name).exists() for name in (MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE))
