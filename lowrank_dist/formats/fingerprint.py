"""A fingerprint of a base model that takes seconds at any size."""

import hashlib
import json
from pathlib import Path

from lowrank_dist.formats.model_folder import open_checkpoint
from lowrank_dist.formats.safetensors_file import read_header, read_into

_SAMPLE = 4096


def fingerprint(folder: Path) -> str:
    """SHA-256 (64 hex digits) over what identifies the base model in a Hugging Face folder.

    Hashed, each preceded by its length as 8 little-endian bytes: the bytes of config.json; then per tensor, sorted by
    name, the JSON list [name, dtype, shape] and up to three samples of 4096 bytes: the first, the middle (from byte
    (n − 4096) // 2) and the last of its n bytes, or all of them when n ≤ 4096. How the tensors are spread over files
    does not matter. A change that misses every sample is not seen: hashing all of a large model takes too long.

    Raises UserError for a folder that is no complete model (see `open_checkpoint`).
    """
    with open_checkpoint(folder) as checkpoint:
        files = {checkpoint.file(name) for name in checkpoint.names()}
        records = {}
        for path in sorted(files):
            header = read_header(path)
            with path.open("rb", buffering=0) as file:
                for entry in header.entries:
                    if entry.name in checkpoint and checkpoint.file(entry.name) == path:
                        description = json.dumps([entry.name, entry.dtype, list(entry.shape)]).encode()
                        sample = bytearray(min(_SAMPLE, entry.nbytes))
                        records[entry.name] = [description]
                        for start in _starts(entry.nbytes):
                            read_into(file, header.data_start + entry.start + start, memoryview(sample))
                            records[entry.name].append(bytes(sample))
    digest = hashlib.sha256()
    pieces = [(folder / "config.json").read_bytes()]
    pieces += [piece for name in sorted(records) for piece in records[name]]
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()


def _starts(nbytes: int) -> tuple[int, ...]:
    if nbytes <= _SAMPLE:
        return (0,)
    return (0, (nbytes - _SAMPLE) // 2, nbytes - _SAMPLE)
