"""The interface to a method's folders (checkpoints and adapters): write, recognise, inspect, publish. No Megatron."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.model_files import hub_hint
from lowrank_dist.errors import UserError
from lowrank_dist.formats.foreign import refuse_foreign_folder
from lowrank_dist.formats.model_folder import Checkpoint
from lowrank_dist.formats.paths import require_copyable
from lowrank_dist.formats.provenance import PROVENANCE_FILE, read_provenance
from lowrank_dist.formats.report import Report
from lowrank_dist.sections.section import MethodSection

# PEFT's file names, used by every method that PEFT has too.
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PUBLISHED = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)
# The programs for which an adapter can be exported.
VLLM, LLAMA_CPP = "vLLM", "llama.cpp"
TARGETS = (VLLM, LLAMA_CPP)


class TrainedFiles(Protocol):
    """The writer of a method's trained weights into a folder, without optimizer state.

    `put` is called once for every tensor of Θ, in fp32, with its stored name; then `finish` once. Either raises
    UserError where there are no tensors, for NaN or infinity, and, after training, for weights that change nothing.
    """

    def put(self, name: str, tensor: Tensor) -> None: ...

    def finish(self) -> None: ...


class Collected:
    """The `TrainedFiles` that keeps every tensor and passes all of them to `write` at the end."""

    def __init__(self, write: Callable[[Mapping[str, Tensor]], None]) -> None:
        self._write = write
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def finish(self) -> None:
        self._write(self._tensors)


@dataclass(frozen=True)
class Published:
    """An adapter to publish. files: files of its folder to copy unchanged. card: the text of its model card.

    write: writes the files that were changed for publishing into another folder. notes: lines for the user, such as
    what was changed.
    """

    files: tuple[str, ...]
    card: str
    write: Callable[[Path], None] = lambda folder: None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Base:
    """The base model with which a trained folder is compared."""

    folder: Path
    architecture: Architecture
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Inspected:
    """The result of inspecting a method's own files.

    base: the base model that they name. require_fit: compares them with a base; mismatches are added to the report or
    raised as UserError. None where there is nothing to compare.
    """

    base: str | None = None
    require_fit: Callable[[Base], None] | None = None


class MethodFiles(ABC):
    """The folders of one method. published: the files that make up the adapter; empty for a whole model."""

    published: ClassVar[tuple[str, ...]]

    @abstractmethod
    def wrote(self, folder: Path) -> bool:
        """Return whether the method wrote the folder, judging by its files."""

    @abstractmethod
    def refuse_merge(self, folder: Path) -> None:
        """Raise UserError for a folder that cannot be merged into the weights of a base."""

    @abstractmethod
    def publish(self, source: Path, name: str, *, target: str | None, max_rank: int | None) -> Published:
        """Return the parts of a folder to publish as `name`; `target` and `max_rank` as in `checkpoint.folder.export`.

        Raises UserError for a folder that cannot be exported or that the reader refuses, and NotServed for one that
        `target` cannot serve.
        """

    @abstractmethod
    def inspect(self, folder: Path, report: Report) -> Inspected:
        """Add facts, tables, warnings and problems of the method's own files to the report."""

    def notes(self, folder: Path) -> list[str]:
        """Return the lines about keys of the folder's config that are not applied."""
        return []

    def complete(self, section: MethodSection, base: Path) -> MethodSection:
        """Return the section, completed from the adapter that training starts from, if it names one.

        Raises UserError where that adapter cannot be read, or does not fit the base or the section.
        """
        return section


def any_there(folder: Path, names: Iterable[str]) -> bool:
    """Return whether the folder has one of the files; a dangling link counts."""
    return any(os.path.lexists(folder / name) for name in names)


def own_file(folder: Path, name: str) -> Path:
    """Return the path of a file of the folder. Raises UserError where it is missing, and as `require_copyable` does."""
    path = folder / name
    if not path.is_file():
        pickle = folder / PICKLE_FILE
        if name == WEIGHTS_FILE and pickle.is_file():
            raise UserError(
                f"{pickle}: a pickle file, which is never read; save the adapter again with safe_serialization=True"
            )
        wanted = "copy the folder completely"
        if name in PUBLISHED:
            wanted = f"give a PEFT adapter folder (with {CONFIG_FILE} and {WEIGHTS_FILE})"
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; {wanted}{hub_hint(folder)}")
        refuse_foreign_folder(folder)
        if any_there(folder / "adapter", (CONFIG_FILE,)):
            raise UserError(f"{folder}: a run, not an adapter; give {folder / 'adapter'}, or one of its checkpoints")
        provenance = read_provenance(folder)
        method = f" (method {provenance.config.get('method')} wrote the folder)" if provenance else ""
        raise UserError(f"{path}: missing{method}; {wanted}")
    return require_copyable(path, folder)


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the Frobenius norm of all tensors together, in fp64."""
    return math.sqrt(sum(torch.linalg.vector_norm(tensor.double()).item() ** 2 for tensor in tensors))


def no_update(folder: Path, what: str) -> UserError:
    """Return the error for merging anything but a low-rank update. what: its kind, and why it cannot be merged."""
    return UserError(
        f"{folder}: {what}, so it cannot be merged (only updates of method lora can); use it with lowrank-dist "
        "generate or evaluate --adapter"
    )


class NotServed(UserError):
    """An adapter that `target`, one of TARGETS, would refuse or read wrongly. reasons: each with its remedy."""

    def __init__(self, source: Path, target: str, reasons: Sequence[str]) -> None:
        super().__init__(f"{source}: not exported for {target}: {'; '.join(reasons)}")
        self.reasons = tuple(reasons)


def not_served(source: Path, what: str, target: str) -> NotServed:
    """Return the error for the export to one of TARGETS of anything but a LoRA adapter. what: its kind."""
    reason = (
        f"{target} serves no adapters but LoRA, and this folder has {what}; leave --for out, or train with method lora"
    )
    return NotServed(source, target, [reason])
