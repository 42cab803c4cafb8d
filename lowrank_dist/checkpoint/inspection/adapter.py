"""An adapter folder, or a checkpoint that is one: what it says, whether it verifies, and how large its update is."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, LowRankFactor, check_pair, own_file, read_pairs
from lowrank_dist.checkpoint.atomic import is_temporary
from lowrank_dist.checkpoint.fingerprint import fingerprint
from lowrank_dist.checkpoint.inspection.model import architecture_of_folder, parameters_of
from lowrank_dist.checkpoint.inspection.report import Report
from lowrank_dist.checkpoint.manifest import MANIFEST_FILE, verify_manifest
from lowrank_dist.checkpoint.peft_config import PeftConfig, read_config
from lowrank_dist.checkpoint.provenance import PROVENANCE_FILE, Provenance, read_provenance
from lowrank_dist.checkpoint.safetensors_file import TensorEntry, read_header, read_into
from lowrank_dist.checkpoint.training_state import is_checkpoint
from lowrank_dist.messages import some_of
from lowrank_dist.model.huggingface import FLOAT_DTYPES, Checkpoint, open_checkpoint

MODULES, SUMMARY = "modules", "update_norms"
_STEP = re.compile(r"step-(\d+)", re.ASCII)


@dataclass
class _Found:
    """What the parts of an inspection hand on to each other; None is what could not be read."""

    folder: Path
    base: Path | None
    report: Report
    config: PeftConfig | None = None
    provenance: Provenance | None = None
    pairs: Mapping[str, tuple[TensorEntry, TensorEntry]] = field(default_factory=dict)


def step_of(folder: Path) -> int | None:
    """N of a folder checkpoints/step-N, links followed; None for any other folder."""
    real = folder.resolve()
    match = _STEP.fullmatch(real.name)
    return int(match[1]) if match and real.parent.name == "checkpoints" else None


def inspect_adapter(folder: Path, base: Path | None = None, *, check_base: bool = True) -> Report:
    """The report on an adapter folder. base: as in `inspect_folder`; check_base: whether to look at a base at all."""
    step = step_of(folder)
    report = Report(folder, "adapter" if step is None else "checkpoint")
    if step is not None:
        report.facts["step"] = step
    if is_temporary(folder.resolve()):
        report.problems.append(f"{folder} is what a killed writer left behind: remove it")
    found = _Found(folder, base, report)
    for part in _PARTS if check_base else _PARTS[:-1]:
        part(found)
    return report


def update_norm(factor: LowRankFactor, scale: float) -> float:
    """‖s·B·A‖ (Frobenius) in fp64, from r × r products: ‖BA‖² = tr((AAᵀ)(BᵀB)), both symmetric."""
    a, b = factor.a.double(), factor.b.double()
    if factor.rank > min(a.size(1), b.size(0)):
        # Here the r × r products would be the large ones, and BA is smaller than one of its factors.
        return abs(scale) * torch.linalg.norm(b @ a).item()
    return abs(scale) * math.sqrt(max(0.0, ((a @ a.T) * (b.T @ b)).sum().item()))


def _in_order(module: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in module.split(".")]


def _read_own(folder: Path, name: str, reader: Callable[[Path], Any]) -> Any:
    return reader(own_file(folder, name))


def _manifest(found: _Found) -> None:
    """A checkpoint is what its manifest says; an adapter has none."""
    if is_checkpoint(found.folder):
        before = len(found.report.problems)
        found.report.read(found.folder / MANIFEST_FILE, verify_manifest, found.folder)
        found.report.facts["manifest"] = "verifies" if len(found.report.problems) == before else "does not verify"


def _config(found: _Found) -> None:
    path = found.folder / CONFIG_FILE
    found.config = config = found.report.read(path, _read_own, found.folder, CONFIG_FILE, read_config)
    if config is None:
        return
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    found.report.facts |= {
        "base": config.base or "not named",
        "targets": config.targets,
        "rank": config.rank,
        "alpha": config.alpha,
        **{label: pattern for label, pattern in patterns.items() if pattern},
        "rslora": config.rslora,
        "dropout": config.dropout,
        "fan_in_fan_out": config.fan_in_fan_out,
    }


def _weights(found: _Found) -> None:
    """Keys, shapes and dtypes from the header, then the factors' values, a pair at a time."""
    report, path = found.report, found.folder / WEIGHTS_FILE
    found.pairs = report.read(path, _read_own, found.folder, WEIGHTS_FILE, read_pairs) or {}
    if not found.pairs:
        return
    entries = [entry for pair in found.pairs.values() for entry in pair]
    report.facts |= {
        "modules": len(found.pairs),
        "parameters": sum(torch.Size(entry.shape).numel() for entry in entries),
        "dtypes": sorted({entry.dtype for entry in entries}),
        "bytes": path.stat().st_size,
    }
    config = found.config
    if config is None:
        return
    before = len(report.problems)
    for module, pair in found.pairs.items():
        report.read(path, check_pair, path, config, module, *pair)
    if isinstance(config.targets, tuple):
        unmatched = [t for t in config.targets if not any(m == t or m.endswith(f".{t}") for m in found.pairs)]
        report.warnings += [f"{found.folder / CONFIG_FILE}: target_modules: {t!r} has no factors" for t in unmatched]
    if len(report.problems) == before:
        rows = report.read(path, _rows, path, config, found.pairs, report)
        if rows is not None:
            _norms(found, rows)


def _rows(
    path: Path, config: PeftConfig, pairs: Mapping[str, tuple[TensorEntry, TensorEntry]], report: Report
) -> list[dict[str, Any]]:
    rows = []
    start = read_header(path).data_start
    with path.open("rb", buffering=0) as file:
        for module in sorted(pairs, key=_in_order):
            a, b = pairs[module]
            factor = LowRankFactor(*(_tensor(file, start, entry) for entry in (a, b)), config.alpha_of(module))
            odd = [e.name for e, x in ((a, factor.a), (b, factor.b)) if not torch.isfinite(x).all()]
            report.problems += [f"{path}: {name} holds NaN or infinity: take an earlier checkpoint" for name in odd]
            zero = [side for side, x in (("B", factor.b), ("A", factor.a)) if not x.any()]
            scale = factor.scale(config.rslora)
            rows.append(
                {
                    "module": module,
                    "out": b.shape[0],
                    "in": a.shape[1],
                    "rank": factor.rank,
                    "alpha": factor.alpha,
                    "scale": scale,
                    "norm": math.nan if odd else update_norm(factor, scale),
                    "note": "NaN or infinity" if odd else " and ".join(f"{side} is zero" for side in zero),
                }
            )
    return rows


def _tensor(file: FileIO, start: int, entry: TensorEntry) -> Tensor:
    """Read, not mapped: the pages of a mapped file count as memory until it is closed."""
    buffer = bytearray(entry.nbytes)
    read_into(file, start + entry.start, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=FLOAT_DTYPES[entry.dtype]).view(entry.shape)


def _norms(found: _Found, rows: list[dict[str, Any]]) -> None:
    report = found.report
    scales = sorted({row["scale"] for row in rows})
    zero = [row["module"] for row in rows if "B is zero" in row["note"]]
    report.facts["scale"] = scales[0] if len(scales) == 1 else scales
    report.facts["update_norm"] = math.sqrt(sum(row["norm"] ** 2 for row in rows))
    report.facts["modules_with_zero_B"] = len(zero)
    if len(zero) == len(rows):
        report.warnings.append(f"{found.folder}: B is zero in every module: it is untrained and changes nothing")
    elif zero:
        report.warnings.append(f"{found.folder}: B is zero in {some_of(zero)}: these modules are as in the base")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", row["module"]), []).append(row)
    report.tables[SUMMARY] = [_summary(leaf, group) for leaf, group in groups.items()]
    report.tables[MODULES] = rows


def _summary(leaf: str, group: list[dict[str, Any]]) -> dict[str, Any]:
    norms = [row["norm"] for row in group]
    # NaN has no place in an order.
    finite = [norm for norm in norms if not math.isnan(norm)] or [math.nan]
    ranks = sorted({row["rank"] for row in group})
    notes = [row["note"] for row in group if row["note"]]
    return {
        "module": leaf,
        "modules": len(group),
        "rank": ranks[0] if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}",
        "min": min(finite),
        "median": median(finite),
        "max": max(finite),
        "note": "; ".join(f"{note} in {count}" for note, count in sorted(Counter(notes).items())),
    }


def _provenance(found: _Found) -> None:
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


def _base(found: _Found) -> None:
    """Whether the base is there, is the one trained on, and has a place for every factor."""
    report, provenance = found.report, found.provenance
    named = [provenance.base if provenance else None, found.config.base if found.config else None]
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
        _fit(found, folder, checkpoint)


def _fit(found: _Found, folder: Path, checkpoint: Checkpoint) -> None:
    report = found.report
    architecture, reason = architecture_of_folder(folder)
    if reason is not None:
        report.warnings.append(f"whether the factors fit the base is not checked: {reason}")
    total = parameters_of(architecture, checkpoint)
    report.facts["base_parameters"] = total
    if "parameters" in report.facts and total:
        report.facts["percent_of_base"] = 100 * report.facts["parameters"] / total
    if architecture is None or not found.pairs:
        return
    inner = architecture.linear_modules()
    linears = inner if architecture.tied else inner | {"lm_head"}
    path = found.folder / WEIGHTS_FILE
    for module, (a, b) in found.pairs.items():
        name = architecture.find(f"{module}.weight", checkpoint)
        if name is None or module not in linears:
            report.problems.append(f"{path}: {module} is no linear of {folder}: give the base that it was trained on")
            continue
        stored = checkpoint.shape(name)
        expected = stored[::-1] if architecture.conv1d and module in inner else stored
        if len(a.shape) == len(b.shape) == 2 and (b.shape[0], a.shape[1]) != expected:
            report.problems.append(
                f"{path}: {module} is [out, in] = [{b.shape[0]}, {a.shape[1]}], but {name} of {folder} is "
                f"{list(stored)}: give the base that it was trained on"
            )
    # PEFT's all-linear leaves the output layer out; only what we wrote names its modules exactly.
    config, wanted = found.config, inner if found.provenance is None else linears
    lacking = sorted(m for m in wanted - found.pairs.keys() if config is not None and config.adapts(m))
    if lacking:
        text = f"{path}: no factors for {some_of(lacking)}, which target_modules names"
        if found.provenance is None:  # layers_to_transform and exclude_modules may mean it so
            report.warnings.append(f"{text}: PEFT leaves them as in the base")
        else:
            report.problems.append(f"{text}: take another checkpoint, this one is incomplete")


# Each part adds what it finds; the base is last, where it can be left out.
_PARTS = (_manifest, _config, _weights, _provenance, _base)
