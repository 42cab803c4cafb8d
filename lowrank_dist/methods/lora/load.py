"""Loading of a PEFT LoRA adapter folder: its config and the names of its tensors are checked, its tensors mapped."""

import json
import math
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.tensors import module_paths, refuse_wrapped_names
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.formats.foreign import foreign_tensors
from lowrank_dist.formats.manifest import is_checkpoint, verify_manifest
from lowrank_dist.formats.paths import detect_removal
from lowrank_dist.formats.safetensors_file import TensorEntry, read_header
from lowrank_dist.methods.files import CONFIG_FILE, WEIGHTS_FILE, own_file
from lowrank_dist.methods.lora.extras import base_copies, is_extra
from lowrank_dist.methods.lora.peft_config import PeftConfig, read_config
from lowrank_dist.untrusted.json import brief

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<module>\w+(\.\w+)*)\.lora_((?P<side>[AB])\.weight|magnitude_vector)", re.ASCII
)
_FLOATS = ("F32", "BF16", "F16")


class PairEntries(NamedTuple):
    """The header entries of one module's tensors in a file. magnitude: None without DoRA."""

    a: TensorEntry
    b: TensorEntry
    magnitude: TensorEntry | None

    @property
    def all(self) -> tuple[TensorEntry, ...]:
        """a, b and, if there is one, magnitude."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


class MappedTensors(Mapping[str, Tensor]):
    """The tensors of an adapter's file by Hugging Face name, in the type and shape in which they are stored.

    The file is mapped: a tensor's bytes are read when they are used. Names are the module's path with `.lora_A.weight`
    [r, in], `.lora_B.weight` [out, r] or, with DoRA, `.lora_magnitude_vector` [out]. Looking up a tensor with NaN or
    infinity raises UserError.
    """

    def __init__(self, path: Path, pairs: Mapping[str, PairEntries]) -> None:
        self._path, self._file = path, safe_open(path, framework="pt")
        self._names = {
            module: [entry.name.removeprefix(_PREFIX) for entry in pairs[module].all] for module in sorted(pairs)
        }
        self._known = {name: None for names in self._names.values() for name in names}

    def of(self, module: str) -> list[str]:
        """Return the names of a module's tensors: A, B and, with DoRA, the magnitude."""
        return self._names[module]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(_PREFIX + name)
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self._path}: {_PREFIX}{name} has NaN or infinity; take an earlier checkpoint")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


@dataclass(frozen=True)
class Adapter:
    """A LoRA or DoRA adapter on disk: its config, and the factors of ΔW = scale·B·A of each module.

    path: its folder, links resolved. base: path or name of the base model, "" where none is named. target_modules:
    module paths or ends of them, or one regular expression. rank, alpha, scale: r, alpha and alpha / r (alpha / √r with
    rsLoRA) where no pattern of the config gives a module its own. ranks, alphas, scales: those of each module that is
    adapted, by its Hugging Face path ("model.layers.0.self_attn.q_proj"). rslora: scales divide by √r. dora: each
    module has a magnitude m, and its weight is m ⊙ (W + ΔW) / ‖W + ΔW‖, row by row. dropout: probability in training.
    fan_in_fan_out: the base stores its linear weights [in, out] (GPT-2). tensors: see `MappedTensors`. copies: names of
    tensors of the file that are taken for copies of the base's embeddings, and are not among `tensors`.
    """

    path: Path
    base: str
    target_modules: tuple[str, ...] | str
    rank: int
    alpha: float
    scale: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    scales: Mapping[str, float]
    rslora: bool
    dora: bool
    dropout: float
    fan_in_fan_out: bool
    tensors: Mapping[str, Tensor]
    copies: tuple[str, ...] = ()


def load_adapter(path: str | Path) -> Adapter:
    """Return the LoRA or DoRA adapter of a PEFT folder or of a run's checkpoint. Values are read when they are used.

    Targets, ranks and scales are as in PEFT. Raises UserError, with file and key, for a missing or incomplete folder, a
    pickle in place of safetensors, links out of the folder, a checkpoint that differs from its manifest, a config that
    makes the update more than ΔW, tensors that are not a LoRA pair on a linear or contradict the config in rank or
    target, and a folder that is removed while it is read (FolderRemoved).
    """
    with detect_removal(Path(path)) as folder:
        config, file, pairs = open_folder(folder)
        tensors, copies = MappedTensors(file, pairs), tuple(entry.name for entry in base_copies(file))
    ranks = {module: config.rank_of(module) for module in pairs}
    alphas = {module: config.alpha_of(module) for module in pairs}
    return Adapter(
        path=folder,
        base=config.base,
        target_modules=config.targets,
        rank=config.rank,
        alpha=config.alpha,
        scale=scale_of(config.alpha, config.rank, config.rslora),
        ranks=ranks,
        alphas=alphas,
        scales={module: scale_of(alphas[module], ranks[module], config.rslora) for module in pairs},
        rslora=config.rslora,
        dora=config.dora,
        dropout=config.dropout,
        fan_in_fan_out=config.fan_in_fan_out,
        tensors=tensors,
        copies=copies,
    )


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """Return s = alpha / r (LoRA, arXiv 2106.09685), or alpha / √r (rsLoRA, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def open_folder(folder: Path) -> tuple[PeftConfig, Path, dict[str, PairEntries]]:
    """Return the config of an adapter folder, its file of weights and the file's entries by module, all checked.

    Raises UserError as `load_adapter` does.
    """
    if is_checkpoint(folder):
        verify_manifest(folder)
    config = read_config(own_file(folder, CONFIG_FILE))
    path = own_file(folder, WEIGHTS_FILE)
    pairs = read_pairs(path)
    for module, entries in pairs.items():
        check_pair(path, config, module, entries)
    return config, path, pairs


def read_pairs(path: Path) -> dict[str, PairEntries]:
    """Return module path → the entries of its A, B and magnitude.

    Raises UserError for other tensors, for half a pair and for a file without factors.
    """
    entries = read_header(path).entries
    refuse_wrapped_names(path, [entry.name for entry in entries], _rename)
    sides: dict[str, dict[str, TensorEntry]] = {"A": {}, "B": {}, "magnitude": {}}
    odd = []
    for entry in entries:
        match = _KEY.fullmatch(entry.name)
        if match is None and not is_extra(entry.name):
            odd.append(entry.name)
        elif match is not None:
            sides[match["side"] or "magnitude"][match["module"]] = entry
    if odd:
        if (what := foreign_tensors(odd)) is not None:
            raise UserError(f"{path}: {what}")
        raise UserError(
            f"{path}: {len(odd)} tensors are not LoRA factors of a linear, such as {odd[0]!r}; give an adapter with "
            "only the keys base_model.model.<module>.lora_A.weight, …lora_B.weight and …lora_magnitude_vector (no "
            "embeddings, no saved modules)"
        )
    half = sorted((set(sides["A"]) ^ set(sides["B"])) | (set(sides["magnitude"]) - set(sides["A"])))
    if half:
        raise UserError(f"{path}: {half[0]} lacks lora_A or lora_B, so the adapter is incomplete; write it again")
    if not sides["A"]:
        raise UserError(f"{path}: has no factors; write the adapter again")
    return {
        module: PairEntries(sides["A"][module], sides["B"][module], sides["magnitude"].get(module))
        for module in sorted(sides["A"])
    }


def _rename(path: Path, part: str) -> str:
    """Return the remedy for a part of tensor names that the file must not have."""
    new, file = (
        json.dumps(text, ensure_ascii=False) for text in (_PREFIX if part.startswith(_PREFIX) else "", str(path))
    )
    # Parts that begin with "_" may be anywhere in a name, the others are at its beginning.
    count = "" if part.startswith("_") else ", 1"
    code = (
        f"from safetensors.torch import load_file, save_file; f={file}; save_file("
        f'{{k.replace("{part}", {new}{count}): v for k, v in load_file(f).items()}}, f, {{"format": "pt"}})'
    )
    return f"save the adapter of the model itself, or rename them: python -c {shlex.quote(code)}"


def check_pair(path: Path, config: PeftConfig, module: str, entries: PairEntries) -> None:
    """Raise UserError where a module's tensors contradict the config."""
    a, b, magnitude = entries
    for entry in (a, b):
        if entry.dtype not in _FLOATS or len(entry.shape) != 2 or 0 in entry.shape:
            raise UserError(
                f"{path}: {entry.name} is {entry.dtype} {list(entry.shape)}, but must be a matrix in "
                f"{', '.join(_FLOATS)}"
            )
    rank = config.rank_of(module)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise UserError(
            f"{path}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but {CONFIG_FILE} gives it "
            f"rank {brief(rank)}, which needs [rank, in] and [out, rank]; write the adapter again"
        )
    if config.dora != (magnitude is not None):
        there = "no lora_magnitude_vector" if magnitude is None else "a lora_magnitude_vector"
        raise UserError(
            f"{path}: {module} has {there}, but use_dora is {str(config.dora).lower()} in {CONFIG_FILE}; correct it, "
            "or write the adapter again"
        )
    if magnitude is not None and (magnitude.dtype not in _FLOATS or magnitude.shape != b.shape[:1]):
        raise UserError(
            f"{path}: {magnitude.name} is {magnitude.dtype} {list(magnitude.shape)}, expected [{b.shape[0]}] in "
            f"{', '.join(_FLOATS)}"
        )
    if not config.adapts(module):
        raise UserError(
            f"{path}: {module} is not a target in {CONFIG_FILE} ({_deciding(config)}), so PEFT would ignore its "
            "factors; correct it, or write the adapter again"
        )


def _deciding(config: PeftConfig) -> str:
    """Return the names of the config's keys that select the target modules."""
    return ", ".join(["target_modules", *config.narrowing])


def require_complete(path: Path, config: PeftConfig, held: Collection[str], architecture: Architecture) -> None:
    """Raise UserError where the file has no factors for a module of the base that its config targets.

    held: the modules for which it has factors. Where the base has none of them, that is the error: a model for images
    and text has its layers under other names, such as model.language_model.layers.0.
    """
    if held and not module_paths(architecture) & set(held):
        example = min(architecture.linear_modules())
        raise UserError(
            f"{path}: none of its modules, such as {min(held)}, is in the base, a {architecture.family} model with "
            f"modules such as {example}; give the base that it was trained on"
        )
    modules = architecture.linear_modules() if config.all_linear else module_paths(architecture)
    lacking = sorted(module for module in modules - set(held) if config.adapts(module))
    if lacking:
        raise UserError(
            f"{path}: no factors for {some_of(lacking)}, which {CONFIG_FILE} names ({_deciding(config)}); give a "
            "complete adapter, or remove these modules from target_modules"
        )
