"""A model cut to some of its layers: which layers, the config.json, and the names of the tensors.

The cut model is the same family with fewer layers, so every reader of model folders takes it as it takes the whole one.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.arch.keys import UnsupportedModel
from lowrank_dist.arch.rope import FULL, SLIDING


def one_of_each_kind(architecture: Architecture, preferred: Collection[int]) -> tuple[int, ...]:
    """Return the number of one layer of each kind, in ascending order: the first in `preferred`, or else the first."""
    found = []
    for kind in architecture.kinds:
        own = [number for number, each in enumerate(architecture.layers) if each == kind]
        found.append(next((number for number in own if number in preferred), own[0]))
    return tuple(sorted(found))


def cut_config(values: Mapping[str, Any], architecture: Architecture, layers: Sequence[int]) -> dict[str, Any]:
    """Return the config.json of a model that has only the given layers, in this order.

    values: the config.json of the whole model. The kind of each layer is written out, because the rules by which a
    family derives it (every sixth layer, from layer 28 on) count from the first layer of the whole model. Raises
    UnsupportedModel for a model of images and text, whose text part has another family's keys and names.
    """
    if architecture.reads_images:
        raise UnsupportedModel(
            f"model_type {architecture.family!r}: a model of images and text is not cut to some of its layers, so "
            "verify does not run on it; use verify with a model of text alone of the same family"
        )
    family, kinds = FAMILIES[architecture.family], [architecture.layers[number] for number in layers]
    cut = dict(values)
    depth = family.keys["layers"]
    cut[depth.name] = len(layers)
    if depth.also in cut:
        cut[depth.also] = len(layers)
    if "kinds" in family.window:
        cut[family.window["kinds"].name] = [FULL if kind.sliding_window is None else SLIDING for kind in kinds]
    if family.no_rope:
        cut[family.no_rope["flags"].name] = [int(kind.rope is not None) for kind in kinds]
    return cut


def source_names(architecture: Architecture, layers: Sequence[int]) -> dict[str, str]:
    """Return the Hugging Face name of every tensor of the cut model → its name in the whole model."""
    names = {rule.hf: rule.hf for rule in architecture.tensors}
    for new, old in enumerate(layers):
        kind = architecture.layers[old]
        templates = [rule.hf for rule in kind.tensors]
        for linear in kind.linears.values():
            for part in linear.parts:
                templates += [f"{part.path}.weight", *([f"{part.path}.bias"] if linear.bias else [])]
        names |= {template.format(layer=new): template.format(layer=old) for template in templates}
    return names


def renumbered(path: str, old: int, new: int) -> str:
    """Return the path of a module of layer `old` as that of layer `new`: its only number is the layer's."""
    return path.replace(f".{old}.", f".{new}.", 1)


def whole_path(path: str, layers: Sequence[int]) -> str:
    """Return the path of a module or tensor of the cut model as the whole model has it. layers: those of the cut."""
    return re.sub(r"\.(\d+)\.", lambda number: f".{layers[int(number[1])]}.", path, count=1)
