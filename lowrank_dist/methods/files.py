"""A method's folders, checkpoints and adapters: how they are written, and what others ask of them. No Megatron."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import Checkpoint
from lowrank_dist.formats.paths import own
from lowrank_dist.formats.provenance import PROVENANCE_FILE
from lowrank_dist.formats.report import Report
from lowrank_dist.sections.section import MethodSection

# PEFT's names, which all methods that it has write.
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PUBLISHED = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)
# The programs that an adapter can be exported for.
VLLM, LLAMA_CPP = "vLLM", "llama.cpp"
TARGETS = (VLLM, LLAMA_CPP)


class TrainedFiles(Protocol):
    """Writes what a method trained into a folder, as those read it who have no use for an optimiser's state.

    It is given every tensor of Θ, by its stored name, in fp32, one after the other, and told when it has them all.
    `finish` raises UserError for what no one may take for trained weights: nothing, NaN or infinity, and where they
    were trained no change.
    """

    def put(self, name: str, tensor: Tensor) -> None: ...

    def finish(self) -> None: ...


class Collected:
    """Keeps every tensor, and hands them to `write` at the end."""

    def __init__(self, write: Callable[[Mapping[str, Tensor]], None]) -> None:
        self._write = write
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def finish(self) -> None:
        self._write(self._tensors)


@dataclass(frozen=True)
class Published:
    """An adapter to publish. files: those to copy, unchanged, out of its folder. card: text of its model card.

    write: writes those that differ from the files in its folder into another. notes: what was changed, in a line each.
    """

    files: tuple[str, ...]
    card: str
    write: Callable[[Path], None] = lambda folder: None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Base:
    """A base model that a trained folder is held against."""

    folder: Path
    architecture: Architecture
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Inspected:
    """The findings that an inspection of a method's own files hands on.

    base: the base model that they name. require_fit: adds to the report, or raises UserError for, what does not fit a
    base; None where there is nothing to hold against it.
    """

    base: str | None = None
    require_fit: Callable[[Base], None] | None = None


class MethodFiles(ABC):
    """The folders of one method. published: files that are the adapter; none where the folder is a whole model."""

    published: ClassVar[tuple[str, ...]]

    @abstractmethod
    def wrote(self, folder: Path) -> bool:
        """Return whether the method wrote the folder, told by its files alone."""

    @abstractmethod
    def refuse_merge(self, folder: Path) -> None:
        """Raise UserError for a folder that cannot be folded into the weights of a base."""

    @abstractmethod
    def publish(self, source: Path, name: str, *, target: str | None, max_rank: int | None) -> Published:
        """Return what to publish of a folder under `name`; `target` and `max_rank` as in `checkpoint.folder.export`.

        Raises UserError for what is not exported, what the reader refuses and what the target would not serve right.
        """

    @abstractmethod
    def inspect(self, folder: Path, report: Report) -> Inspected:
        """Add facts, tables, warnings and problems of the method's own files to the report."""

    def notes(self, folder: Path) -> list[str]:
        """Return a line for each thing that the folder's own config says and that is not applied."""
        return []

    def complete(self, section: MethodSection, base: Path) -> MethodSection:
        """Return the method's section with what the adapter says that training starts from.

        Raises UserError where that adapter cannot be read, or fits neither the base nor the section.
        """
        return section


def any_there(folder: Path, names: Iterable[str]) -> bool:
    """Return whether the folder has one of the files, be it a link that leads nowhere."""
    return any(os.path.lexists(folder / name) for name in names)


def own_file(folder: Path, name: str) -> Path:
    """Return the path of a file of the folder. Raises UserError where it is missing, and as `own` does."""
    path = folder / name
    if not path.is_file():
        pickle = folder / PICKLE_FILE
        if name == WEIGHTS_FILE and pickle.is_file():
            raise UserError(
                f"{pickle} is a pickle and is never read: save the adapter again with safe_serialization=True"
            )
        wanted = f"give a PEFT adapter folder (with {CONFIG_FILE} and {WEIGHTS_FILE})"
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder: {wanted}")
        if any_there(folder / "adapter", (CONFIG_FILE,)):
            raise UserError(f"{folder} is a run, not an adapter: give {folder / 'adapter'}, or one of its checkpoints")
        raise UserError(f"{path} is missing: {wanted}")
    return own(path, folder)


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the Frobenius norm over all of them, in fp64."""
    return math.sqrt(sum(torch.linalg.vector_norm(tensor.double()).item() ** 2 for tensor in tensors))


def no_update(folder: Path, what: str) -> UserError:
    """Return the refusal to merge what is no low-rank update; `what` it is, and why no weight takes it up."""
    return UserError(
        f"{folder} is {what}: it cannot be merged, only low-rank updates (method lora) can. Give it to "
        "lowrank-dist generate or evaluate with --adapter"
    )


def not_served(source: Path, what: str, target: str) -> UserError:
    """Return the refusal to export for one of TARGETS anything but a LoRA adapter."""
    return UserError(
        f"{source} is not exported for {target}: it is {what}, and of adapters {target} serves LoRA alone; leave --for "
        "out, or train with method lora"
    )
