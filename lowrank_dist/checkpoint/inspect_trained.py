"""Inspection of an adapter or checkpoint of any method: manifest, the method's own files, provenance and base."""

import os
from pathlib import Path

from lowrank_dist.formats.atomic import is_temporary
from lowrank_dist.formats.manifest import MANIFEST_FILE, is_checkpoint, verify_manifest
from lowrank_dist.formats.model_folder import open_checkpoint
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance, fingerprint, read_provenance
from lowrank_dist.formats.report import Report, count_parameters, try_architecture
from lowrank_dist.methods.files import Base, Inspected, own_file
from lowrank_dist.methods.registry import method_package_reading
from lowrank_dist.untrusted.files import STEP_NAME


def inspect_trained(folder: Path, base: Path | None = None, *, check_base: bool = True) -> Report:
    """Return the report on an adapter folder or a checkpoint of any method.

    base: as in `inspect_folder`. check_base: also check the base.
    """
    step = step_number(folder)
    report = Report(folder, "adapter" if step is None else "checkpoint")
    if step is not None:
        report.facts["step"] = step
    if is_temporary(folder.resolve()):
        report.problems.append(f"{folder}: left unfinished by a process that was killed; remove it")
    _check_manifest(folder, report)
    inspected = method_package_reading(folder).files.inspect(folder, report)
    provenance = _read_provenance_facts(folder, report)
    if check_base:
        _check_base(folder, base, report, inspected, provenance)
    return report


def step_number(folder: Path) -> int | None:
    """Return N of a folder checkpoints/step-N, links followed; None for any other folder."""
    real = folder.resolve()
    match = STEP_NAME.fullmatch(real.name)
    return int(match[1]) if match and real.parent.name == "checkpoints" else None


def _check_manifest(folder: Path, report: Report) -> None:
    """Check a checkpoint against its manifest; an adapter has none."""
    if is_checkpoint(folder):
        before = len(report.problems)
        report.read(folder / MANIFEST_FILE, verify_manifest, folder)
        report.facts["manifest"] = "verifies" if len(report.problems) == before else "does not verify"


def _read_provenance_facts(folder: Path, report: Report) -> Provenance | None:
    path = folder / PROVENANCE_FILE
    if not os.path.lexists(path):
        report.facts["provenance"] = f"none: there is no {PROVENANCE_FILE}"
        return None
    owned = report.read(path, own_file, folder, PROVENANCE_FILE)
    provenance = report.read(path, read_provenance, folder) if owned else None
    if provenance is not None:
        trained_to = provenance.training.get("step")
        if "step" not in report.facts and isinstance(trained_to, int):
            report.facts["step"] = trained_to
        report.facts["created_by"] = str(provenance.created_by)
        report.facts["versions"] = provenance.versions
        report.facts["config"] = provenance.config
        report.facts["base_fingerprint"] = provenance.base_fingerprint
    return provenance


def _check_base(
    trained: Path, base: Path | None, report: Report, inspected: Inspected, provenance: Provenance | None
) -> None:
    """Check that the base is there, has the recorded fingerprint, and has modules that the trained tensors fit.

    base: the folder to check, instead of the one that provenance or adapter name.
    """
    named = [provenance.base if provenance else None, inspected.base]
    folders = [Path(name) for name in named if isinstance(name, str) and name and os.path.isdir(name)]
    folder = base or (folders[0] if folders else None)
    if folder is None:
        report.facts["base_folder"] = "not found; give --base DIR to check the adapter against it"
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
                f"{trained / PROVENANCE_FILE}: base_fingerprint is {provenance.base_fingerprint[:12]}…, but {folder} "
                f"has {digest[:12]}…; give the base that it was trained on, unchanged, with --base"
            )
    with checkpoint:
        architecture, reason = try_architecture(folder)
        if reason is not None:
            report.warnings.append(f"the trained tensors were not checked against the base: {reason}")
        total = count_parameters(architecture, checkpoint)
        report.facts["base_parameters"] = total
        if "parameters" in report.facts and total:
            report.facts["percent_of_base"] = 100 * report.facts["parameters"] / total
        if architecture is not None and inspected.require_fit is not None:
            report.read(folder, inspected.require_fit, Base(folder, architecture, checkpoint))
