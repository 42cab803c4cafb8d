"""Inspection of a LoRA adapter, or of a LoRA checkpoint: its config, its tensors and the norms of its updates."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.errors import some_of
from lowrank_dist.formats.model_folder import FLOAT_DTYPES
from lowrank_dist.formats.report import Report
from lowrank_dist.formats.safetensors_file import TensorEntry, read_header, read_into
from lowrank_dist.methods.files import CONFIG_FILE, WEIGHTS_FILE, Base, Inspected, own_file
from lowrank_dist.methods.lora.extras import note_on_copies, require_copies
from lowrank_dist.methods.lora.files import LowRankFactor
from lowrank_dist.methods.lora.load import PairEntries, check_pair, read_pairs, require_complete
from lowrank_dist.methods.lora.peft_config import PeftConfig, key_notes, read_config

MODULES, SUMMARY = "modules", "update_norms"


@dataclass
class _Found:
    """The readable parts of an adapter's files; unreadable ones are None or empty."""

    folder: Path
    report: Report
    config: PeftConfig | None = None
    pairs: Mapping[str, PairEntries] = field(default_factory=dict)


def inspect_adapter(folder: Path, report: Report) -> Inspected:
    """Add the content of a LoRA adapter's config and weights to the report; see `MethodFiles.inspect`."""
    found = _Found(folder, report)
    _config(found)
    _weights(found)
    base = None if found.config is None else found.config.base
    return Inspected(base, partial(_fit, found))


def update_norm(factor: LowRankFactor, scale: float) -> float:
    """Return ‖s·B·A‖ (Frobenius) in fp64, from r × r products: ‖BA‖² = tr((AAᵀ)(BᵀB)), both symmetric."""
    a, b = factor.a.double(), factor.b.double()
    if factor.rank > min(a.size(1), b.size(0)):
        # Here r × r products would be larger than BA.
        return abs(scale) * torch.linalg.norm(b @ a).item()
    return abs(scale) * math.sqrt(max(0.0, ((a @ a.T) * (b.T @ b)).sum().item()))


def _in_order(module: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10: numbers go by their digits, of which there may be many."""
    return [(len(part) if part.isdecimal() else 0, part) for part in module.split(".")]


def _read_own(folder: Path, name: str, reader: Callable[[Path], Any]) -> Any:
    return reader(own_file(folder, name))


def _config(found: _Found) -> None:
    path = found.folder / CONFIG_FILE
    found.config = config = found.report.read(path, _read_own, found.folder, CONFIG_FILE, read_config)
    if config is None:
        return
    found.report.warnings.extend(key_notes(path))
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    found.report.facts.update(
        {
            "method": "lora",
            "base": config.base or "not named",
            "targets": config.targets,
            **config.narrowing,
            "rank": config.rank,
            "alpha": config.alpha,
            **{label: pattern for label, pattern in patterns.items() if pattern},
            "rslora": config.rslora,
            "dora": config.dora,
            "dropout": config.dropout,
            "fan_in_fan_out": config.fan_in_fan_out,
        }
    )


def _weights(found: _Found) -> None:
    """Add keys, shapes and dtypes from the header, then read the factors' values, one pair at a time."""
    report, path = found.report, found.folder / WEIGHTS_FILE
    found.pairs = report.read(path, _read_own, found.folder, WEIGHTS_FILE, read_pairs) or {}
    if not found.pairs:
        return
    entries = [entry for pair in found.pairs.values() for entry in pair.all]
    report.facts.update(
        {
            "modules": len(found.pairs),
            "parameters": sum(torch.Size(entry.shape).numel() for entry in entries),
            "dtypes": sorted({entry.dtype for entry in entries}),
            "bytes": path.stat().st_size,
        }
    )
    report.warnings.extend(note_on_copies(path))
    config = found.config
    if config is None:
        return
    before = len(report.problems)
    for module, pair in found.pairs.items():
        report.read(path, check_pair, path, config, module, pair)
    if isinstance(config.targets, tuple):
        unmatched = [t for t in config.targets if not any(m == t or m.endswith(f".{t}") for m in found.pairs)]
        report.warnings.extend(
            [f"{found.folder / CONFIG_FILE}: target_modules: {t!r} has no factors" for t in unmatched]
        )
    if len(report.problems) == before:
        rows = report.read(path, _rows, path, config, found.pairs, report)
        if rows is not None:
            _norms(found, rows)


def _rows(path: Path, config: PeftConfig, pairs: Mapping[str, PairEntries], report: Report) -> list[dict[str, Any]]:
    rows = []
    start = read_header(path).data_start
    with path.open("rb", buffering=0) as file:
        for module in sorted(pairs, key=_in_order):
            a, b, _ = pairs[module]
            tensors = {entry.name: _tensor(file, start, entry) for entry in pairs[module].all}
            factor = LowRankFactor(tensors[a.name], tensors[b.name], config.alpha_of(module))
            odd = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
            report.problems.extend([f"{path}: {name} has NaN or infinity; take an earlier checkpoint" for name in odd])
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
    """Return one tensor, read and not mapped: pages of a mapped file count as memory until it is closed."""
    buffer = bytearray(entry.nbytes)
    read_into(file, start + entry.start, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=FLOAT_DTYPES[entry.dtype]).view(entry.shape)


def _norms(found: _Found, rows: list[dict[str, Any]]) -> None:
    report = found.report
    scales = sorted({row["scale"] for row in rows})
    zero = [row["module"] for row in rows if "B is zero" in row["note"]]
    report.facts["scale"] = scales[0] if len(scales) == 1 else scales
    dora = found.config is not None and found.config.dora
    # The norm of DoRA's whole update would need the base, whose rows it scales.
    name = "update_norm_before_scaling" if dora else "update_norm"
    report.facts[name] = math.sqrt(sum(row["norm"] ** 2 for row in rows))
    report.facts["modules_with_zero_B"] = len(zero)
    if len(zero) == len(rows):
        effect = "so only its magnitudes can change the base" if dora else "so it is untrained and changes nothing"
        report.warnings.append(f"{found.folder}: B is zero in every module, {effect}")
    elif zero:
        effect = "so only their magnitudes can change them" if dora else "so these modules are as in the base"
        report.warnings.append(f"{found.folder}: B is zero in {some_of(zero)}, {effect}")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", row["module"]), []).append(row)
    report.tables[SUMMARY] = [_summary(leaf, group) for leaf, group in groups.items()]
    report.tables[MODULES] = rows


def _summary(leaf: str, group: list[dict[str, Any]]) -> dict[str, Any]:
    norms = [row["norm"] for row in group]
    # NaN cannot be ordered.
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


def _fit(found: _Found, base: Base) -> None:
    """Report factors that do not fit the base, and targets without factors."""
    report, folder, architecture, checkpoint = found.report, base.folder, base.architecture, base.checkpoint
    if not found.pairs:
        return
    inner = architecture.linear_modules()
    linears = inner if architecture.tied else inner | {"lm_head"}
    path = found.folder / WEIGHTS_FILE
    foreign = []
    for module, (a, b, _) in found.pairs.items():
        name = architecture.find(f"{module}.weight", checkpoint)
        if name is None or module not in linears:
            foreign.append(module)
            continue
        stored = checkpoint.shape(name)
        expected = stored[::-1] if architecture.conv1d and module in inner else stored
        if len(a.shape) == len(b.shape) == 2 and (b.shape[0], a.shape[1]) != expected:
            report.problems.append(
                f"{path}: {module} is [out, in] = [{b.shape[0]}, {a.shape[1]}], but {name} of {folder} is "
                f"{list(stored)}; give the base that it was trained on"
            )
    report.warnings[:] = [said for said in report.warnings if said not in note_on_copies(path)]
    report.read(path, require_copies, found.folder, folder)
    if foreign:
        what = "is not a linear" if len(foreign) == 1 else "are not linears"
        report.problems.append(f"{path}: {some_of(foreign)} {what} of {folder}; give the base that it was trained on")
    if found.config is not None:
        report.read(path, require_complete, path, found.config, found.pairs, architecture)
