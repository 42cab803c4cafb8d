"""What is looked at in a trained folder whatever method wrote it: its manifest, where it comes from, and its base."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.checkpoint.inspection.model import architecture_of_folder, parameters_of
from lowrank_dist.checkpoint.inspection.report import Report
from lowrank_dist.formats.atomic import is_temporary
from lowrank_dist.formats.fingerprint import fingerprint
from lowrank_dist.formats.manifest import MANIFEST_FILE, is_checkpoint, verify_manifest
from lowrank_dist.formats.model_folder import Checkpoint, open_checkpoint
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance, read_provenance
from lowrank_dist.methods.lora.files import own_file

_STEP = re.compile(r"step-(\d+)", re.ASCII)


@dataclass
class Found:
    """What the parts of an inspection hand on to each other; None is what could not be read.

    base: the folder to check against, in place of the one that is named. named: the base that the folder's config says.
    """

    folder: Path
    base: Path | None
    report: Report
    named: str | None = None
    provenance: Provenance | None = None


def step_of(folder: Path) -> int | None:
    """N of a folder checkpoints/step-N, links followed; None for any other folder."""
    real = folder.resolve()
    match = _STEP.fullmatch(real.name)
    return int(match[1]) if match and real.parent.name == "checkpoints" else None


def begin(folder: Path) -> Report:
    """The report on a trained folder, before anything in it is read."""
    step = step_of(folder)
    report = Report(folder, "adapter" if step is None else "checkpoint")
    if step is not None:
        report.facts["step"] = step
    if is_temporary(folder.resolve()):
        report.problems.append(f"{folder} is what a killed writer left behind: remove it")
    return report


def look_at_manifest(found: Found) -> None:
    """A checkpoint is what its manifest says; an adapter has none."""
    if is_checkpoint(found.folder):
        before = len(found.report.problems)
        found.report.read(found.folder / MANIFEST_FILE, verify_manifest, found.folder)
        found.report.facts["manifest"] = "verifies" if len(found.report.problems) == before else "does not verify"


def look_at_provenance(found: Found) -> None:
    report, path = found.report, found.folder / PROVENANCE_FILE
    if not os.path.lexists(path):
        report.facts["provenance"] = f"none: there is no {PROVENANCE_FILE}"
        return
    owned = report.read(path, own_file, found.folder, PROVENANCE_FILE)
    found.provenance = report.read(path, read_provenance, found.folder) if owned else None
    if found.provenance is not None:
        report.facts["created_by"] = str(found.provenance.created_by)
        report.facts["versions"] = report.read(path, _flat, found.provenance.versions)
        report.facts["config"] = report.read(path, _sections, found.provenance.config)
        report.facts["base_fingerprint"] = found.provenance.base_fingerprint


def _sections(config: Any) -> Any:
    return {str(name): _flat(inner) for name, inner in config.items()} if isinstance(config, dict) else _leaf(config)


def _flat(section: Any) -> Any:
    return {str(key): _leaf(value) for key, value in section.items()} if isinstance(section, dict) else _leaf(section)


def _leaf(value: Any) -> Any:
    return value if value is None or isinstance(value, str | bool | int | float) else json.dumps(value)


def look_at_base(found: Found, fit: Callable[[Path, Architecture, Checkpoint], None]) -> None:
    """Whether the base is there, is the one trained on, and takes what was trained.

    fit: given the base's folder, architecture and weights, adds to the report what does not fit.
    """
    report, provenance = found.report, found.provenance
    named = [provenance.base if provenance else None, found.named]
    folders = [Path(name) for name in named if isinstance(name, str) and name and os.path.isdir(name)]
    folder = found.base or (folders[0] if folders else None)
    if folder is None:
        report.facts["base_folder"] = "not at hand: give --base DIR to check the adapter against it"
        return
    report.facts["base_folder"] = str(folder)
    checkpoint = report.read(folder, open_checkpoint, folder)
    digest = report.read(folder, fingerprint, folder) if checkpoint else None
    if checkpoint is None or digest is None:
        report.facts["base_verifies"] = False
        return
    if provenance is None:
        report.facts["base_matches"] = "unknown: no fingerprint is recorded"
    else:
        report.facts["base_matches"] = digest == provenance.base_fingerprint
        if digest != provenance.base_fingerprint:
            report.problems.append(
                f"{found.folder / PROVENANCE_FILE}: base_fingerprint is {provenance.base_fingerprint[:12]}…, but "
                f"{folder} has {digest[:12]}…: give the base that it was trained on, unchanged, with --base"
            )
    with checkpoint:
        architecture, reason = architecture_of_folder(folder)
        if reason is not None:
            report.warnings.append(f"whether what was trained fits the base is not checked: {reason}")
        total = parameters_of(architecture, checkpoint)
        report.facts["base_parameters"] = total
        if "parameters" in report.facts and total:
            report.facts["percent_of_base"] = 100 * report.facts["parameters"] / total
        if architecture is not None:
            fit(folder, architecture, checkpoint)
