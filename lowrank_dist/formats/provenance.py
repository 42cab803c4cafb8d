"""lowrank_dist.json beside an adapter: which base it was trained on, and with what."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lowrank_dist import __version__
from lowrank_dist.errors import UserError
from lowrank_dist.formats.fingerprint import fingerprint

PROVENANCE_FILE = "lowrank_dist.json"
_FORMAT = 1
_PACKAGES = ("torch", "transformers", "deepspeed", "megatron-core")


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Provenance:
    """base_fingerprint: `fingerprint` of the base folder; base: its path when it was trained on; config: the run's.

    created_by and versions describe the installation and are filled in. training: what the trainer knows when it
    writes, in JSON, each key optional: step, epoch, tokens, target_tokens, data (path, sha256, samples), loss and
    eval_loss in nats a token, eval_METRIC of what was generated.
    """

    base_fingerprint: str
    base: str
    config: Mapping[str, Any]
    created_by: str = field(default_factory=lambda: f"lowrank_dist {__version__}")
    versions: Mapping[str, str] = field(
        default_factory=lambda: {
            "python": platform.python_version(),
            **{name: _installed(name) for name in _PACKAGES},
        }
    )
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of lowrank_dist.json. `config` (`Config.read_keys`) and `training` must be JSON."""
        whole = {"format": _FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        return json.dumps(whole, indent=2) + "\n"


def read_provenance(folder: Path) -> Provenance | None:
    """What lowrank_dist.json in an adapter folder says; None when there is none. UserError when it is malformed."""
    path = folder / PROVENANCE_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']!r}, this version reads format {_FORMAT}")
        found.setdefault("training", {})  # files from before it was recorded have none
        provenance = Provenance(**{name: found[name] for name in Provenance.__dataclass_fields__})
        if not isinstance(provenance.base_fingerprint, str):
            raise ValueError("base_fingerprint is no text")
        if not isinstance(provenance.training, dict):
            raise ValueError("training is no mapping")
        return provenance
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path} is not what lowrank_dist writes ({type(error).__name__}: {error}): restore the file, or remove it "
            "to go without the check that the adapter belongs to the base"
        ) from error


def refuse_another_base(folder: Path, base: Path) -> None:
    """Raise UserError where lowrank_dist.json beside the adapter names a base of another fingerprint."""
    provenance = read_provenance(folder)
    if provenance is None:
        return
    digest = fingerprint(base)
    if digest != provenance.base_fingerprint:
        raise UserError(
            f"{folder / PROVENANCE_FILE}: base_fingerprint is {provenance.base_fingerprint[:12]}…, but {base} has "
            f"{digest[:12]}…: give the base that the adapter was trained on, unchanged"
        )
