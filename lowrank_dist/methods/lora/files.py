"""A LoRA adapter as a PEFT folder: adapter_config.json, adapter_model.safetensors and lowrank_dist.json."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.tensors import module_paths
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.formats.atomic import atomic_folder, final_path
from lowrank_dist.formats.manifest import is_checkpoint, verify_manifest
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance
from lowrank_dist.formats.safetensors_file import TensorEntry, read_header, write_fp32
from lowrank_dist.methods.files import CONFIG_FILE, WEIGHTS_FILE, own_file
from lowrank_dist.methods.lora.peft_config import PeftConfig, describe, read_config

_KEY = re.compile(
    r"base_model\.model\.(?P<module>\w+(\.\w+)*)\.lora_((?P<side>[AB])\.weight|magnitude_vector)", re.ASCII
)
_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class LowRankFactor:
    """One pair of factors: a [r, in], b [out, r]; ΔW = s·b·a is [out, in].

    magnitude: DoRA's m [out]; the weight is then m ⊙ (W + ΔW) / ‖W + ΔW‖, row by row. None without DoRA.
    """

    a: Tensor
    b: Tensor
    alpha: float
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.a.ndim == self.b.ndim == 2 and self.a.size(0) == self.b.size(1), "a is [r, in], b is [out, r]"
        assert self.magnitude is None or self.magnitude.shape == self.b.shape[:1], "magnitude is [out]"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """a, b and, if there is one, magnitude."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def rank(self) -> int:
        """r, the number of rows of a."""
        return self.a.size(0)

    def scale(self, rslora: bool) -> float:
        """Return s = alpha / r (LoRA, arXiv 2106.09685), or alpha / √r (rsLoRA, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """All factors of one adapter.

    factors: Hugging Face module path ("model.layers.0.self_attn.q_proj") → its factors.
    fan_in_fan_out: the base stores its linear weights [in, out] (GPT-2). base: path or name of the base model.
    """

    factors: Mapping[str, LowRankFactor]
    dropout: float
    rslora: bool
    fan_in_fan_out: bool
    base: str

    @property
    def dora(self) -> bool:
        """Return whether the factors have magnitudes: either all have or none has."""
        return any(factor.magnitude is not None for factor in self.factors.values())


class PairEntries(NamedTuple):
    """The header entries of one module's tensors in a file. magnitude: None without DoRA."""

    a: TensorEntry
    b: TensorEntry
    magnitude: TensorEntry | None

    @property
    def all(self) -> tuple[TensorEntry, ...]:
        """a, b and, if there is one, magnitude."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


def write_adapter(
    folder: Path, adapter: Adapter, provenance: Provenance, modules: Collection[str], *, trained: bool
) -> None:
    """Write an adapter folder, atomically, that plain PEFT loads with exactly these modules, ranks and scales.

    modules: `module_paths` of the base; they decide how far the target names in the config can be shortened.
    trained: the factors have been trained, so B = 0 everywhere is an error. Factors are stored in fp32.

    Raises UserError for an existing folder, an empty adapter, B = 0 everywhere, NaN or infinity, or a failing disk.
    """
    with atomic_folder(folder) as temporary:
        write_adapter_files(temporary, adapter, provenance, modules, trained=trained)


def write_adapter_files(
    folder: Path, adapter: Adapter, provenance: Provenance, modules: Collection[str], *, trained: bool
) -> None:
    """Write the three files of `write_adapter` into an existing folder, such as the temporary one of `atomic_folder`.

    Raises UserError, with the final path, for an empty adapter, B = 0 everywhere after training, NaN or infinity.
    """
    target = final_path(folder)
    if not adapter.factors:
        raise UserError(f"{target}: not written, because the adapter has no factors; check lora.targets")
    assert set(adapter.factors) <= set(modules), "factors on modules that the base lacks"
    tensors = named_tensors(adapter)
    require_finite(folder, tensors, "lower train.lr or resume earlier")
    if trained and not any(factor.b.any() for factor in adapter.factors.values()):
        raise UserError(
            f"{target}: not written, because B is zero in every module, so training did not change the model; raise "
            "train.lr or train.steps"
        )
    config = describe(
        {module: (factor.rank, factor.alpha) for module, factor in adapter.factors.items()},
        modules,
        dropout=adapter.dropout,
        rslora=adapter.rslora,
        dora=adapter.dora,
        fan_in_fan_out=adapter.fan_in_fan_out,
        base=adapter.base,
    )
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    (folder / PROVENANCE_FILE).write_text(provenance.to_json(), encoding="utf-8")
    write_fp32(folder / WEIGHTS_FILE, tensors)


def require_finite(folder: Path, tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Raise UserError, with the final path of the folder, where a tensor is not finite."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{final_path(folder)}: not written, because {name} has NaN or infinity; {remedy}")


def named_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return PEFT's key → contiguous fp32 tensor on the CPU, sorted by module path."""
    named = {}
    for module, factor in sorted(adapter.factors.items()):
        tensors = {"A.weight": factor.a, "B.weight": factor.b, "magnitude_vector": factor.magnitude}
        for name, tensor in tensors.items():
            if tensor is not None:
                named[f"base_model.model.{module}.lora_{name}"] = tensor.detach().to("cpu", torch.float32).contiguous()
    return named


def read_adapter(folder: Path, architecture: Architecture | None = None) -> Adapter:
    """Read any PEFT LoRA adapter folder; targets and patterns match as in PEFT. Factors are returned in fp32.

    architecture: the base's, if known; the adapter must then have factors for every module that its config names
    (`require_complete`).

    Raises UserError, with file and key, for a missing or incomplete folder, a pickle in place of safetensors, links out
    of the folder, a checkpoint that differs from its manifest, a config that `read_config` refuses, tensors that are
    not a LoRA pair on a linear or contradict the config in rank or target, and NaN or infinity.
    """
    if is_checkpoint(folder):
        verify_manifest(folder)
    config = read_config(own_file(folder, CONFIG_FILE))
    path = own_file(folder, WEIGHTS_FILE)
    pairs = read_pairs(path)
    for module, entries in pairs.items():
        check_pair(path, config, module, entries)
    if architecture is not None:
        require_complete(path, config, pairs, architecture)
    factors = {}
    with safe_open(path, framework="pt") as file:
        for module, entries in pairs.items():
            tensors = [file.get_tensor(entry.name).float() for entry in entries.all]
            for entry, tensor in zip(entries.all, tensors, strict=True):
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{path}: {entry.name} has NaN or infinity; take an earlier checkpoint")
            a, b, *magnitude = tensors
            factors[module] = LowRankFactor(a, b, config.alpha_of(module), *magnitude)
    return Adapter(factors, config.dropout, config.rslora, config.fan_in_fan_out, config.base)


def read_pairs(path: Path) -> dict[str, PairEntries]:
    """Return module path → the entries of its A, B and magnitude.

    Raises UserError for other tensors, for half a pair and for a file without factors.
    """
    sides: dict[str, dict[str, TensorEntry]] = {"A": {}, "B": {}, "magnitude": {}}
    odd = []
    for entry in read_header(path).entries:
        match = _KEY.fullmatch(entry.name)
        if match is None:
            odd.append(entry.name)
        else:
            sides[match["side"] or "magnitude"][match["module"]] = entry
    if odd:
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
            f"rank {rank}, which needs [{rank}, in] and [out, {rank}]; write the adapter again"
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

    held: the modules for which it has factors.
    """
    modules = architecture.linear_modules() if config.all_linear else module_paths(architecture)
    lacking = sorted(module for module in modules - set(held) if config.adapts(module))
    if lacking:
        raise UserError(
            f"{path}: no factors for {some_of(lacking)}, which {CONFIG_FILE} names ({_deciding(config)}); give a "
            "complete adapter, or remove these modules from target_modules"
        )
