"""The table of methods: names, config sections and homes. To add a method, add its folder and a row.

Imports no torch. What a home does with files comes with torch, how it trains with Megatron: both are imported when
they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol, get_args

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.plan.job import Footprint
from lowrank_dist.sections.section import MethodName, MethodSection

if TYPE_CHECKING:
    from lowrank_dist.methods.files import MethodFiles
    from lowrank_dist.methods.method import Tuner


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the methods that a plan puts beside its own.

    rank: of factors on every linear. bottleneck: m. virtual: positions of prefix and prompt. reparametrised: width of
    the prefix' MLP, None for none.
    """

    rank: int = 8
    bottleneck: int = 64
    virtual: int = 32
    reparametrised: int | None = None


class Footprints(Protocol):
    """The functions of the module `footprint` of every home."""

    def footprint_of(self, method: MethodName, section: MethodSection, architecture: Architecture) -> Footprint:
        """Return the footprint of a run. Raises UserError where the section does not fit the model."""
        ...

    def footprints_of_size(
        self, method: MethodName, sizes: Sizes, architecture: Architecture, tensor: int
    ) -> Sequence[Footprint]:
        """Return the footprints at these sizes, one for each way to lie on `tensor` ranks."""
        ...


@dataclass(frozen=True)
class Home:
    """The home of the methods `names`. section: of the config, if they have one.

    folder: of this room. written: the MethodFiles, as module:object.
    """

    folder: str
    names: tuple[MethodName, ...]
    section: str | None
    written: str

    @property
    def files(self) -> MethodFiles:
        """The method's folders: recognised, published, inspected. Imports torch, but no Megatron."""
        return resolve_name(f"{__package__}.{self.written}")

    @property
    def footprint(self) -> Footprints:
        """What the method trains, stores, computes and sends, in closed formulas. Imports no torch."""
        return resolve_name(f"{__package__}.{self.folder}.footprint")

    @property
    def tuner(self) -> Tuner:
        """How the method is attached to a model. Imports Megatron."""
        return resolve_name(f"{__package__}.{self.folder}.method")


# In the order in which they are asked whether a folder is theirs: LoRA takes every PEFT folder that is no other's, and
# a checkpoint of any method but full fine-tuning has no config.json.
HOMES = (
    Home("bottleneck", ("adapter_h", "adapter_l"), "adapter", "bottleneck.files:FILES"),
    Home("prefix", ("prefix",), "prefix", "prompt_files:PREFIX"),
    Home("prompt", ("prompt",), "prompt", "prompt_files:PROMPT"),
    Home("lora", ("lora",), "lora", "lora.folder:FILES"),
    Home("full", ("full",), None, "full.files:FILES"),
)
SECTIONS = tuple(each.section for each in HOMES if each.section is not None)
_BY_NAME = {name: each for each in HOMES for name in each.names}


def home(name: MethodName) -> Home:
    """Return the home of a method by its name in a run's config."""
    return _BY_NAME[name]


def footprints_beside(own: Footprint, sizes: Sizes, architecture: Architecture, tensor: int) -> list[Footprint]:
    """Return what to compare `own` with on `tensor` ranks: every other method, and its own as it may lie otherwise."""
    found: list[Footprint] = []
    for name in get_args(MethodName):
        of_size = home(name).footprint.footprints_of_size(name, sizes, architecture, tensor)
        found += own.placed_otherwise(tensor) if name == own.name else of_size
    return found


def home_of(folder: Path) -> Home | None:
    """Return the home of the method that wrote the folder, told by its files alone, or None.

    A Hugging Face model counts as written by full fine-tuning, whose checkpoints are such folders.
    """
    return next((each for each in HOMES if each.files.wrote(folder)), None)


def reader_of(folder: Path) -> Home:
    """Return the home to read a folder with: LoRA's where no method knows it, whose errors say what is missing."""
    return home_of(folder) or home("lora")
