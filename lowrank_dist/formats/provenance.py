"""The origin of an adapter (lowrank_dist.json beside it): the base's fingerprint, the run's config and training."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lowrank_dist import __version__
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import open_checkpoint
from lowrank_dist.formats.safetensors_file import read_header, read_into
from lowrank_dist.untrusted.json import brief, read_object, typed_value

PROVENANCE_FILE = "lowrank_dist.json"
_FORMAT = 1
_PACKAGES = ("torch", "transformers", "deepspeed", "megatron-core")
_SAMPLE = 4096
_KINDS: Mapping[str, type] = {
    "base_fingerprint": str,
    "base": str,
    "config": dict,
    "created_by": str,
    "versions": dict,
    "training": dict,
}


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 (64 hex digits) that identifies the base model in a Hugging Face folder.

    Hashed, each preceded by its length as 8 little-endian bytes: the bytes of config.json; then per tensor, sorted by
    name, the JSON list [name, dtype, shape] and up to three samples of 4096 bytes: the first, the middle (from byte
    (n − 4096) // 2) and the last of its n bytes, or all of them when n ≤ 4096. The distribution of tensors over files
    does not matter. A change outside all samples is not detected: hashing a large model whole takes too long.

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


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def digest_of(files: Iterable[Path]) -> str:
    """Return the SHA-256 (64 hex digits) of the existing files among `files`, by name and content."""
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name} ".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {name: _installed(name) for name in _PACKAGES}


@dataclass(frozen=True)
class Provenance:
    """The content of lowrank_dist.json.

    base_fingerprint: `fingerprint` of the base folder; base: its path in training; config: the run's. created_by and
    versions describe the installation and are filled in by default. training: what the trainer knows when it writes, in
    JSON, each key optional: step, epoch, tokens, target_tokens, data (path, sha256, samples), loss and eval_loss in
    nats per token, eval_METRIC of generated texts, new_ends (the ids that end the trained texts and are no stop tokens
    in the base's files), data_format ("messages" for chats, "completion" for prompts with completions). A merged
    model's (`merged_provenance`) has the base, a config with the adapters, and only data_format in `training`.
    """

    base_fingerprint: str
    base: str
    config: Mapping[str, Any]
    created_by: str = field(default_factory=lambda: f"lowrank_dist {__version__}")
    versions: Mapping[str, str] = field(
        default_factory=lambda: {"python": platform.python_version(), **installed_versions()}
    )
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def new_ends(self) -> list[int]:
        """The new_ends in `training`; empty where they were not recorded."""
        found = self.training.get("new_ends")
        return [end for end in found if isinstance(end, int)] if isinstance(found, list) else []

    @property
    def trained_on_chats(self) -> bool | None:
        """True if the training data were chats; None where it was not recorded."""
        return None if self.data_format is None else self.data_format == "messages"

    @property
    def data_format(self) -> str | None:
        """The data_format in `training`; None where it was not recorded."""
        found = self.training.get("data_format")
        return found if isinstance(found, str) else None

    def to_json(self) -> str:
        """Return the text of lowrank_dist.json. `config` (`Config.read_keys`) and `training` must be JSON."""
        whole = {"format": _FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        return json.dumps(whole, indent=2) + "\n"


def read_provenance(folder: Path) -> Provenance | None:
    """Return the content of an adapter folder's lowrank_dist.json, None without one. Raises UserError if malformed."""
    path = folder / PROVENANCE_FILE
    if not path.exists():
        return None
    remedy = "restore the file, or remove it to skip the check that the adapter belongs to the base"
    found = read_object(path, remedy)
    if found.get("format") != _FORMAT:
        stated = brief(found.get("format"))
        raise UserError(f"{path}: format is {stated}, but this version reads format {_FORMAT}; {remedy}")
    found.setdefault("training", {})  # files from before it was recorded have none
    for key, kind in _KINDS.items():
        if typed_value(found, key, kind, path, remedy) is None:
            raise UserError(f"{path}: {key} is missing; {remedy}")
    return Provenance(**{key: found[key] for key in _KINDS})


def trained_on_chats(*folders: Path) -> bool:
    """Return whether the first of the folders that records it was trained on chats; False where none does."""
    said = (provenance.trained_on_chats for provenance in map(read_provenance, folders) if provenance is not None)
    return next((chats for chats in said if chats is not None), False)


def merged_provenance(base: Path, adapters: Mapping[Path, float]) -> Provenance | None:
    """Return the provenance of a base with adapters merged in (folder → weight); None where no adapter has one.

    Its data_format is that of the adapters, else of the base; it has none where the adapters differ.
    """
    found = {folder: read_provenance(folder) for folder in adapters}
    known = [provenance for provenance in found.values() if provenance is not None]
    if not known:
        return None
    own = read_provenance(base)
    formats = {each.data_format for each in known if each.data_format is not None}
    if not formats and own is not None and own.data_format is not None:
        formats = {own.data_format}
    config = [
        {"adapter": str(folder), "weight": weight, "config": None if each is None else each.config}
        for (folder, weight), each in zip(adapters.items(), found.values(), strict=True)
    ]
    training = {"data_format": formats.pop()} if len(formats) == 1 else {}
    return Provenance(fingerprint(base), str(base), {"merged": config}, training=training)


def refuse_another_base(folder: Path, base: Path) -> None:
    """Raise UserError where the base's fingerprint is not the one in lowrank_dist.json beside the adapter."""
    provenance = read_provenance(folder)
    if provenance is None:
        return
    digest = fingerprint(base)
    if digest != provenance.base_fingerprint:
        raise UserError(
            f"{folder / PROVENANCE_FILE}: base_fingerprint is {provenance.base_fingerprint[:12]}…, but {base} has "
            f"{digest[:12]}…; give the base that the adapter was trained on, unchanged"
        )
