"""NVIDIA's apex: finding it, and using its fused norms and AdamW on CUDA.

PyPI's `apex` is another package, a toolkit for Pyramid web applications. The installed one is identified from files and
metadata, so no code of an unrelated package runs. The interface is that of github.com/NVIDIA/apex, apex/normalization/
fused_layer_norm.py and apex/optimizers/fused_adam.py. Importing this module imports neither apex nor torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."
)
_EXTENSIONS = ("fused_layer_norm_cuda", "amp_C")
_USED = {"apex.normalization": ("FusedRMSNorm", "FusedLayerNorm"), "apex.optimizers": ("FusedAdam",)}

_plain = False


@dataclass(frozen=True)
class Apex:
    """The `apex` that Python would import. reason: its name or, where it is not usable, the cause and the remedy."""

    which: Literal["none", "unrelated", "nvidia"]
    version: str | None
    usable: bool
    reason: str


def find_apex() -> Apex:
    """Return the installed apex. Only NVIDIA's with CUDA extensions is imported, to check that they fit this torch."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Apex("none", None, False, f"apex is not installed; build NVIDIA's (not PyPI's) with `{BUILD}`")
    folders = list(spec.submodule_search_locations or ())
    distribution = _distribution(folders)
    version = distribution.version if distribution else None
    # find_spec("apex.normalization") would import the parent; the path finder does not.
    if not all(PathFinder.find_spec(module, folders) for module in _USED):
        return Apex("unrelated", version, False, _unrelated(spec, folders, distribution))
    name = f"NVIDIA's apex {version or 'of unknown version'}"
    missing = [module for module in _EXTENSIONS if importlib.util.find_spec(module) is None]
    if missing:
        reason = f"{name} is installed without its CUDA extensions ({', '.join(missing)}); build them with `{BUILD}`"
        return Apex("nvidia", version, False, reason)
    try:
        # apex first: it imports torch, without whose libraries the extensions do not load.
        for module, classes in _USED.items():
            for used in classes:
                getattr(importlib.import_module(module), used)
        for module in _EXTENSIONS:
            importlib.import_module(module)
    except Exception as error:  # any error of a mismatched apex or torch: kept as the reason
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return Apex(
            "nvidia", version, False, f"{name} cannot be imported ({said}); build it for this torch with `{BUILD}`"
        )
    return Apex("nvidia", version, True, name)


installed_apex = cache(find_apex)


def use_plain(plain: bool) -> None:
    """Disable apex from now on (plain=True), or use it again where it is usable (engine.kernels)."""
    global _plain
    _plain = plain


def norm_class(kind: str, device: str) -> Callable[..., nn.Module]:
    """Return the "RMSNorm" or "LayerNorm" class for `device` ("cpu" or "cuda"), to be called with features and eps=.

    apex's parameters have torch's names and start as fp32; input and parameters must have the same dtype.
    """
    if _taken(device):
        return getattr(importlib.import_module("apex.normalization"), f"Fused{kind}")
    from torch import nn

    return {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[kind]


def adamw(device: str) -> Callable[..., Optimizer]:
    """Return the AdamW class for parameters on `device`, to be called with the groups, lr=, betas= and eps=.

    exp_avg and exp_avg_sq are fp32. apex counts steps per group, torch per parameter. apex pairs the groups with a list
    that it builds at construction, so a group that is empty at construction is never updated.
    """
    if _taken(device):
        return partial(importlib.import_module("apex.optimizers").FusedAdam, adam_w_mode=True)
    from torch.optim import AdamW

    return AdamW


def describe(device: str) -> str:
    """Return one line that says which library provides norms and AdamW on `device`, and why."""
    if _taken(device):
        return f"norms and AdamW from {installed_apex().reason}"
    return f"norms and AdamW from PyTorch: {installed_apex().reason if device == 'cuda' else 'apex is for CUDA'}"


def _taken(device: str) -> bool:
    return device == "cuda" and not _plain and installed_apex().usable


def _distribution(folders: Sequence[str]) -> Distribution | None:
    """Return the installed distribution that the found package belongs to; None where no metadata lies beside it."""
    places = {Path(folder).resolve() for folder in folders}
    found = distributions(name="apex")
    return next((one for one in found if Path(str(one.locate_file("apex"))).resolve() in places), None)


def _unrelated(spec: ModuleSpec, folders: Sequence[str], distribution: Distribution | None) -> str:
    if distribution is None:
        where = spec.origin or ", ".join(folders)
        return f"{where} is called apex but is not NVIDIA's; move it off the path, then build NVIDIA's with `{BUILD}`"
    summary = distribution.metadata["Summary"] or "no summary"
    return (
        f"apex {distribution.version} is not NVIDIA's but another package of that name ({summary}); run `pip "
        f"uninstall apex`, then build NVIDIA's with `{BUILD}`"
    )
