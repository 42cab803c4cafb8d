"""Checks before a merge: the adapters, that they belong to the base, the output and room on the disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from lowrank_dist.errors import UserError
from lowrank_dist.formats.paths import lies_in, require_outside
from lowrank_dist.formats.provenance import PROVENANCE_FILE, fingerprint, read_provenance
from lowrank_dist.formats.text_files import TOKENIZER_FILES
from lowrank_dist.merging.options import WeightedAdapter


def require_distinct(adapters: Sequence[WeightedAdapter]) -> None:
    """Raise UserError where an adapter is given twice, or none is given."""
    seen = set()
    for adapter in adapters:
        if adapter.path.resolve() in seen:
            raise UserError(f"{adapter.path}: given twice as adapter; give it once, with the sum of the weights")
        seen.add(adapter.path.resolve())
    if not seen:
        raise UserError("no adapter to merge; give at least one")


def require_output(out: Path, base: Path) -> None:
    """Raise UserError where the output is, or lies in, the base or another folder that must stay as it is."""
    if lies_in(out, base):
        raise UserError(f"{out}: is or lies in the base folder {base}; give an output path outside it")
    require_outside(out)


def check_bases(base: Path, adapters: Sequence[WeightedAdapter], force_mismatch: bool) -> list[str]:
    """Return warnings where it is not known that the adapters were trained on this base.

    Raises UserError where a fingerprint shows that one was not, unless force_mismatch.
    """
    warnings = []
    found: str | None = None
    for adapter in adapters:
        provenance = read_provenance(adapter.path)
        if provenance is None:
            warnings.append(
                f"{adapter.path}: has no {PROVENANCE_FILE}, so only names and shapes were checked against {base}"
            )
            continue
        found = found or fingerprint(base)
        if found == provenance.base_fingerprint:
            continue
        mismatch = (
            f"{adapter.path}: trained on another base than {base} (fingerprint {provenance.base_fingerprint[:12]}… "
            f"of {provenance.base or 'an unnamed model'}, found {found[:12]}…)"
        )
        if not force_mismatch:
            raise UserError(f"{mismatch}; give the base that it was trained on, with unchanged weights and config.json")
        warnings.append(mismatch)
    return warnings


def note_on_no_tokenizer(merged: Path, base: Path) -> list[str]:
    """Return a warning where a merged folder has no tokenizer of any kind."""
    if any((merged / name).is_file() for name in TOKENIZER_FILES):
        return []
    return [
        f"{base}: has no tokenizer, and the adapter brings none, so the merged model has none, and llama.cpp and vLLM "
        "refuse it; give one as --tokenizer DIR"
    ]


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError where the disk of a folder has less room than the bytes needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent}: {free >> 20} MiB free, but the merged model needs {needed >> 20} MiB; free some space"
        )
