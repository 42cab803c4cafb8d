"""A folder that any method wrote; here prefixes, prompts, adapter layers and checkpoints of full fine-tuning."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.checkpoint.inspection.adapter import inspect_adapter
from lowrank_dist.checkpoint.inspection.found import (
    Found,
    begin,
    look_at_base,
    look_at_manifest,
    look_at_provenance,
)
from lowrank_dist.checkpoint.inspection.model import inspect_model
from lowrank_dist.checkpoint.inspection.report import Report
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import open_checkpoint
from lowrank_dist.formats.safetensors_file import read_header
from lowrank_dist.methods import prompt_files as prompt_learning
from lowrank_dist.methods.bottleneck import files as bottlenecks
from lowrank_dist.methods.kinds import kind_of
from lowrank_dist.methods.lora.files import WEIGHTS_FILE

_Fit = Callable[[Architecture], None]


def inspect_trained(folder: Path, base: Path | None = None, *, check_base: bool = True) -> Report:
    """The report on an adapter folder or a checkpoint of any method; the arguments are `inspect_adapter`'s."""
    kind = kind_of(folder)
    if kind in ("lora", None):
        return inspect_adapter(folder, base, check_base=check_base)
    report = begin(folder)
    found = Found(folder, base, report)
    look_at_manifest(found)
    if kind == "bottlenecks":
        fit = _bottlenecks(found)
    elif kind == "model":
        fit = _whole_model(found)
    else:
        fit = _prompt_learning(found, kind)
    look_at_provenance(found)
    if check_base:
        look_at_base(found, lambda where, architecture, _: report.read(where, fit, architecture))
    return report


def _prompt_learning(found: Found, kind: str) -> _Fit:
    report, folder = found.report, found.folder
    path = folder / WEIGHTS_FILE
    learned = report.read(path, prompt_learning.read_prompt_learning, folder)
    report.facts["method"] = kind
    if learned is None:
        return _anything_fits
    found.named = learned.base
    report.facts |= {
        "base": learned.base or "not named",
        "virtual_positions": learned.embeddings.size(0),
        "layers": learned.layers,
        "heads": learned.heads,
        "token_dim": learned.token_dim,
        "parameters": learned.embeddings.numel(),
        "dtypes": sorted({entry.dtype for entry in read_header(path).entries}),
        "bytes": path.stat().st_size,
        "norm": _norm([learned.embeddings]),
    }
    return lambda architecture: prompt_learning.require_fit(folder, learned, architecture)


def _bottlenecks(found: Found) -> _Fit:
    report, folder = found.report, found.folder
    path = folder / bottlenecks.WEIGHTS_FILE
    read = report.read(path, bottlenecks.read_bottlenecks, folder)
    if read is None:
        return _anything_fits
    config, tensors = read.config, read.tensors
    found.named = config.base
    # What comes out of a layer is zero, and the base as it was, where this is zero.
    ends = [tensor for name, tensor in tensors.items() if ".up." in name]
    report.facts |= {
        "method": config.method,
        "base": config.base,
        "bottleneck": config.bottleneck,
        "layers": config.layers,
        "hidden": config.hidden,
        "after": list(bottlenecks.places(config.method)),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": ["F32"],
        "bytes": path.stat().st_size,
        "norm": _norm(ends),
    }
    if not any(tensor.any() for tensor in ends):
        report.warnings.append(f"{folder}: every up-projection is zero: it is untrained and changes nothing")
    return lambda architecture: bottlenecks.require_fit(folder, config, architecture)


def _whole_model(found: Found) -> _Fit:
    """A checkpoint of full fine-tuning: a model folder like any other, whose every number has to be finite."""
    report, folder = found.report, found.folder
    model = inspect_model(folder)
    report.facts |= {"method": "full", **model.facts}
    report.warnings += model.warnings
    report.problems += model.problems
    if model.verifies:
        report.read(folder, _require_finite, folder)
    return _anything_fits


def _anything_fits(architecture: Architecture) -> None:
    """Of a whole model the fingerprint says what there is to say, and what could not be read is reported already."""


def _require_finite(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.names():
            if not torch.isfinite(checkpoint.slice(name)[:]).all():
                raise UserError(f"{checkpoint.file(name)}: {name} holds NaN or infinity: take an earlier checkpoint")


def _norm(tensors: Iterable[Tensor]) -> float:
    """Frobenius, over all of them, in fp64."""
    return math.sqrt(sum(torch.linalg.vector_norm(tensor.double()).item() ** 2 for tensor in tensors))
