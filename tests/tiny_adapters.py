"""Random adapters for the models of tiny_models, for any test."""

from collections.abc import Callable
from pathlib import Path

import torch

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.tensors import hf_shapes, module_paths
from lowrank_dist.engine.inspection import inspect
from lowrank_dist.formats.provenance import Provenance, fingerprint
from lowrank_dist.formats.report import Report
from lowrank_dist.methods.lora.files import AdapterFactors, LowRankFactor, write_adapter

# Module path → (r, alpha) of its factors, None for a module without.
Size = Callable[[str], tuple[int, float] | None]


def random_adapter(
    base: Path,
    size: Size = lambda module: (3, 6.0),
    *,
    rslora: bool = False,
    seed: int = 0,
    scale: float = 0.1,
    dora: bool = False,
) -> AdapterFactors:
    """Return random factors for each linear of `base` (lm_head too if untied) to which `size` gives a rank and alpha.

    scale: standard deviation of B (A has 1). dora: with magnitudes around 1.
    """
    architecture = read_architecture(base)
    paths = architecture.linear_modules() | {"lm_head"}
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, shape in sorted(hf_shapes(architecture).items()):
        module = name.removesuffix(".weight")
        if module not in paths or (chosen := size(module)) is None:
            continue
        rows, columns = shape[::-1] if architecture.conv1d else shape
        rank, alpha = chosen
        a = torch.randn(rank, columns, generator=generator)
        b = scale * torch.randn(rows, rank, generator=generator)
        magnitude = 1 + 0.2 * torch.randn(rows, generator=generator) if dora else None
        factors[module] = LowRankFactor(a, b, alpha, magnitude)
    return AdapterFactors(factors, 0.0, rslora, architecture.conv1d, str(base))


def save_adapter(folder: Path, base: Path, adapter: AdapterFactors, *, trained: bool = True) -> Path:
    """Write `adapter` as trained on `base` into `folder`, and return `folder`."""
    provenance = Provenance(fingerprint(base), str(base), {"lora": {"rank": 2}})
    modules = module_paths(read_architecture(base))
    write_adapter(folder, adapter, provenance, modules, trained=trained)
    return folder


def inspected(folder: Path, base: Path | None = None) -> Report:
    """Return the report of `lowrank-dist inspect` on a folder."""
    return inspect(folder, base)
