"""A LoRA adapter as a PEFT folder: adapter_config.json, adapter_model.safetensors and lowrank_dist.json."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import atomic_folder, final_path
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance
from lowrank_dist.formats.safetensors_file import write_fp32
from lowrank_dist.methods.files import CONFIG_FILE, WEIGHTS_FILE
from lowrank_dist.methods.lora.load import MappedTensors, open_folder, require_complete, scale_of
from lowrank_dist.methods.lora.peft_config import describe


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
        return scale_of(self.alpha, self.rank, rslora)


@dataclass(frozen=True)
class AdapterFactors:
    """All factors of one adapter, in memory: what training writes and a merge reads.

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


def write_adapter(
    folder: Path, adapter: AdapterFactors, provenance: Provenance, modules: Collection[str], *, trained: bool
) -> None:
    """Atomically write an adapter folder that plain PEFT loads with exactly these modules, ranks and scales.

    modules: `module_paths` of the base; they decide how far the target names in the config can be shortened.
    trained: the factors have been trained, so B = 0 everywhere is an error. Factors are stored in fp32.

    Raises UserError for an existing folder, and as `write_adapter_files` does; DiskError where a write fails.
    """
    with atomic_folder(folder) as temporary:
        write_adapter_files(temporary, adapter, provenance, modules, trained=trained)


def write_adapter_files(
    folder: Path, adapter: AdapterFactors, provenance: Provenance, modules: Collection[str], *, trained: bool
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


def named_tensors(adapter: AdapterFactors) -> dict[str, Tensor]:
    """Return PEFT's key → contiguous fp32 tensor on the CPU, sorted by module path."""
    named = {}
    for module, factor in sorted(adapter.factors.items()):
        tensors = {"A.weight": factor.a, "B.weight": factor.b, "magnitude_vector": factor.magnitude}
        for name, tensor in tensors.items():
            if tensor is not None:
                named[f"base_model.model.{module}.lora_{name}"] = tensor.detach().to("cpu", torch.float32).contiguous()
    return named


def read_adapter(folder: Path, architecture: Architecture | None = None) -> AdapterFactors:
    """Read any PEFT LoRA adapter folder, as `load_adapter` does, into factors in fp32.

    architecture: the base's, if known; the adapter must then have factors for every module that its config names
    (`require_complete`). Raises UserError, with file and key, as `load_adapter` does, and for NaN and infinity.
    """
    config, path, pairs = open_folder(folder)
    if architecture is not None:
        require_complete(path, config, pairs, architecture)
    tensors, factors = MappedTensors(path, pairs), {}
    for module in pairs:
        a, b, *magnitude = (tensors[name].float() for name in tensors.of(module))
        factors[module] = LowRankFactor(a, b, config.alpha_of(module), *magnitude)
    return AdapterFactors(factors, config.dropout, config.rslora, config.fan_in_fan_out, config.base)
