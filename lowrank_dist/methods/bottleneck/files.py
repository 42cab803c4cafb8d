"""The folder format of adapter layers: bottleneck_config.json and bottleneck_model.safetensors. PEFT has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.keys import MOST_LAYERS
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import final_path
from lowrank_dist.formats.manifest import is_checkpoint, verify_manifest
from lowrank_dist.formats.model_card import NOT_MERGED, USE, WITH_GENERATE, base_model, model_card, plain
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance, read_provenance
from lowrank_dist.formats.report import Report
from lowrank_dist.formats.safetensors_file import read_header, write_fp32
from lowrank_dist.methods.bottleneck.config import has_norm, places
from lowrank_dist.methods.files import (
    Inspected,
    MethodFiles,
    Published,
    any_there,
    no_update,
    norm,
    not_served,
    own_file,
)
from lowrank_dist.untrusted.json import read_object

CONFIG_FILE = "bottleneck_config.json"
WEIGHTS_FILE = "bottleneck_model.safetensors"
PUBLISHED = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)


class BottleneckConfig(BaseModel):
    """The content of bottleneck_config.json. method: as in a run's config. base: path or name of the base model."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    method: Literal["adapter_h", "adapter_l"]
    bottleneck: int = Field(ge=1)
    layers: int = Field(ge=1, le=MOST_LAYERS)
    hidden: int = Field(ge=1)
    base: str


@dataclass(frozen=True)
class Bottlenecks:
    """The adapter layers of a model. tensors: name → unsharded fp32 tensor, as in `stored_shapes`."""

    config: BottleneckConfig
    tensors: Mapping[str, Tensor]


def stored_shapes(config: BottleneckConfig, layer: int, place: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of one bottleneck's tensors, in the order of the parameters of method.Bottleneck."""
    hidden, bottleneck = config.hidden, config.bottleneck
    norm = {"norm.weight": (hidden,), "norm.bias": (hidden,)} if has_norm(config.method) else {}
    shapes = {
        **norm,
        "down.weight": (bottleneck, hidden),
        "down.bias": (bottleneck,),
        "up.weight": (hidden, bottleneck),
        "up.bias": (hidden,),
    }
    return {f"layers.{layer}.{place}.{name}": shape for name, shape in shapes.items()}


def write_bottlenecks(folder: Path, bottlenecks: Bottlenecks, provenance: Provenance, *, trained: bool) -> None:
    """Write the three files into an existing folder.

    Raises UserError for NaN or infinity, and for `trained` layers whose up-projections are all zero.
    """
    target, tensors = final_path(folder), bottlenecks.tensors
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{target}: not written, because {name} has NaN or infinity; lower train.lr or resume earlier"
            )
    if trained and not any(tensor.any() for name, tensor in tensors.items() if ".up." in name):
        raise UserError(
            f"{target}: not written, because every up-projection is zero, so training did not change the model; "
            "raise train.lr or train.steps"
        )
    (folder / CONFIG_FILE).write_text(bottlenecks.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / PROVENANCE_FILE).write_text(provenance.to_json(), encoding="utf-8")
    write_fp32(folder / WEIGHTS_FILE, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def read_bottlenecks(folder: Path) -> Bottlenecks:
    """Read what `write_bottlenecks` wrote. Raises UserError, with file and key, for anything else."""
    if is_checkpoint(folder):
        verify_manifest(folder)
    where = own_file(folder, CONFIG_FILE)
    try:
        config = BottleneckConfig.model_validate(read_object(where, "take another folder"))
    except ValidationError as error:
        raise UserError(
            f"{where}: not in the format that lowrank_dist writes ({error}); take another folder"
        ) from error
    path = own_file(folder, WEIGHTS_FILE)
    expected = {
        name: shape
        for layer in range(config.layers)
        for place in places(config.method)
        for name, shape in stored_shapes(config, layer, place).items()
    }
    found = {entry.name: entry.shape for entry in read_header(path).entries if entry.dtype == "F32"}
    odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if odd:
        raise UserError(
            f"{path}: {odd[0]} has shape {found.get(odd[0])} in fp32, but {CONFIG_FILE} asks for "
            f"{expected.get(odd[0])}; take another folder"
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in expected}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} has NaN or infinity; take an earlier checkpoint")
    return Bottlenecks(config, tensors)


def require_fit(folder: Path, config: BottleneckConfig, architecture: Architecture) -> None:
    """Raise UserError where the model's sizes differ from those of the model that was trained."""
    if (config.layers, config.hidden) != (len(architecture.layers), architecture.hidden):
        raise UserError(
            f"{folder / CONFIG_FILE}: trained for {config.layers} layers of width {config.hidden}, but the model has "
            f"{len(architecture.layers)} of width {architecture.hidden}; give the model that it was trained on"
        )


class BottleneckFiles(MethodFiles):
    """The folders of adapter layers, for adapter_h and adapter_l."""

    published = PUBLISHED

    def wrote(self, folder: Path) -> bool:
        return any_there(folder, (CONFIG_FILE, WEIGHTS_FILE))

    def refuse_merge(self, folder: Path) -> None:
        raise no_update(
            folder,
            "adapter layers, whose nonlinearity no weight of the base can represent",
        )

    def publish(self, source: Path, name: str, *, target: str | None, max_rank: int | None) -> Published:
        provenance = read_provenance(source)
        if target is not None:
            raise not_served(source, "adapter layers", target)
        found = read_bottlenecks(source)
        config, size = found.config, sum(tensor.numel() for tensor in found.tensors.values())
        about = (
            f"Adapter layers ({plain(config.method)}) of {base_model(config.base)}: bottlenecks of width "
            f"{config.bottleneck} after {' and '.join(places(config.method))} in every one of {config.layers} layers, "
            f"{size:,} parameters."
        )
        usage = f"{USE}\n\n{WITH_GENERATE}\n\nPEFT has no such method. {NOT_MERGED}"
        card = model_card(name, "adapter-layers", config.base, about, usage, provenance, library="lowrank_dist")
        return Published(self.published, card)

    def inspect(self, folder: Path, report: Report) -> Inspected:
        path = folder / WEIGHTS_FILE
        found = report.read(path, read_bottlenecks, folder)
        if found is None:
            return Inspected()
        config, tensors = found.config, found.tensors
        # Where the up-projection is zero, the bottleneck adds nothing to the base.
        ends = [tensor for name, tensor in tensors.items() if ".up." in name]
        report.facts.update(
            {
                "method": config.method,
                "base": config.base,
                "bottleneck": config.bottleneck,
                "layers": config.layers,
                "hidden": config.hidden,
                "after": list(places(config.method)),
                "parameters": sum(tensor.numel() for tensor in tensors.values()),
                "dtypes": ["F32"],
                "bytes": path.stat().st_size,
                "norm": norm(ends),
            }
        )
        if not any(tensor.any() for tensor in ends):
            report.warnings.append(f"{folder}: every up-projection is zero, so it is untrained and changes nothing")
        return Inspected(config.base, lambda base: require_fit(folder, config, base.architecture))


FILES = BottleneckFiles()
