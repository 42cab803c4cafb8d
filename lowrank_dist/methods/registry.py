"""The table of methods: names, config sections and folders of code. To add a method, add its folder and a row.

Imports no torch. The file code of a method imports torch and its training code Megatron; both are imported on first
use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol, get_args

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.planner.job import Footprint
from lowrank_dist.sections.section import MethodName, MethodSection

if TYPE_CHECKING:
    from lowrank_dist.methods.files import MethodFiles
    from lowrank_dist.methods.method import MethodBuilder
    from lowrank_dist.methods.reference import ReferenceBuilder


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the other methods in the table of a plan.

    rank: r of the factors on every linear. bottleneck: width m. virtual_positions: those of prefix and prompt.
    reparametrised: width of the prefix's MLP, None for a prefix without one.
    """

    rank: int = 8
    bottleneck: int = 64
    virtual_positions: int = 32
    reparametrised: int | None = None


class Footprints(Protocol):
    """The functions that the module `footprint` of every method's folder has."""

    def footprint_of(self, method: MethodName, section: MethodSection, architecture: Architecture) -> Footprint:
        """Return the footprint of a run. Raises UserError where the section does not fit the model."""
        ...

    def footprints_of_size(
        self, method: MethodName, sizes: Sizes, architecture: Architecture, tensor: int
    ) -> Sequence[Footprint]:
        """Return the footprints at these sizes, one for each placement on `tensor` ranks."""
        ...


@dataclass(frozen=True)
class MethodPackage:
    """The folder of code that implements the methods `names`. section: their section of the config, or None.

    folder: its name inside this package. with_images: it trains the text part of a model of images and text as well.
    files_object: the MethodFiles, as module:object.
    """

    folder: str
    names: tuple[MethodName, ...]
    section: str | None
    files_object: str
    with_images: bool = False

    @property
    def files(self) -> MethodFiles:
        """The MethodFiles of the method. Imports torch, but not Megatron."""
        return resolve_name(f"{__package__}.{self.files_object}")

    @property
    def footprint(self) -> Footprints:
        """The module that computes the method's parameters, memory, FLOPs and messages. Imports no torch."""
        return resolve_name(f"{__package__}.{self.folder}.footprint")

    @property
    def builder(self) -> MethodBuilder:
        """The module that builds the method and attaches it to a model. Imports Megatron."""
        return resolve_name(f"{__package__}.{self.folder}.method")

    @property
    def reference(self) -> ReferenceBuilder:
        """The module that applies the method to transformers' own modules. Its functions import transformers."""
        return resolve_name(f"{__package__}.{self.folder}.reference")


# `method_package_of` asks them in this order. LoRA claims every PEFT folder, so prefix and prompt come before it. Full
# fine-tuning claims no checkpoint of another method: those have no config.json.
METHOD_PACKAGES = (
    MethodPackage("bottleneck", ("adapter_h", "adapter_l"), "adapter", "bottleneck.files:FILES"),
    MethodPackage("prefix", ("prefix",), "prefix", "prompt_files:PREFIX"),
    MethodPackage("prompt", ("prompt",), "prompt", "prompt_files:PROMPT"),
    MethodPackage("lora", ("lora",), "lora", "lora.folder:FILES", with_images=True),
    MethodPackage("full", ("full",), None, "full.files:FILES"),
)
SECTIONS = tuple(each.section for each in METHOD_PACKAGES if each.section is not None)
_BY_NAME = {name: each for each in METHOD_PACKAGES for name in each.names}


def method_package(name: MethodName) -> MethodPackage:
    """Return the `MethodPackage` of a method by its name in a run's config."""
    return _BY_NAME[name]


def footprints_beside(own: Footprint, sizes: Sizes, architecture: Architecture, tensor: int) -> list[Footprint]:
    """Return the footprints to compare with `own` on `tensor` ranks: other methods, and its own in other placements."""
    found: list[Footprint] = []
    for name in get_args(MethodName):
        of_size = method_package(name).footprint.footprints_of_size(name, sizes, architecture, tensor)
        found += own.placed_otherwise(tensor) if name == own.name else of_size
    return found


def method_package_of(folder: Path) -> MethodPackage | None:
    """Return the `MethodPackage` of the method that wrote the folder, judging by its files, or None.

    A Hugging Face model counts as full fine-tuning, whose checkpoints are such folders.
    """
    return next((each for each in METHOD_PACKAGES if each.files.wrote(folder)), None)


def method_package_reading(folder: Path) -> MethodPackage:
    """Return the `MethodPackage` that reads a folder.

    If none recognises the folder, it is LoRA's, whose errors say what is missing.
    """
    return method_package_of(folder) or method_package("lora")
