"""The update of each stored tensor: Σ w·s·B·A over the adapters that have factors for it, or one DoRA adapter's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import Checkpoint
from lowrank_dist.methods.lora.files import AdapterFactors, LowRankFactor


@dataclass(frozen=True)
class Term:
    """One adapter's term of an update: scale·b·a. scale: includes the adapter's weight. adapter: its index."""

    factor: LowRankFactor
    scale: float
    adapter: int = 0


@dataclass(frozen=True)
class Update:
    """The update of one stored tensor: the sum of the terms, transposed where the base stores [in, out] (GPT-2).

    A DoRA term (with magnitudes m) has no others beside it: the merged weight is m ⊙ (W + s·B·A) / ‖W + s·B·A‖, with
    one norm per output.
    """

    terms: tuple[Term, ...]
    transposed: bool

    @property
    def takes_all_rows(self) -> bool:
        """True if `apply` needs all rows of the stored tensor at once, as DoRA's norms do if outputs are columns."""
        return self.transposed and self.terms[0].factor.magnitude is not None

    def apply(
        self, rows: slice, weight: Tensor, dtype: torch.dtype | None = None, without: int | None = None
    ) -> Tensor:
        """Return rows `rows` of the merged tensor, given the same rows of the stored one.

        The sum is formed in fp32 (fp64 for an fp64 base) and rounded once, to `dtype` (None: that of `weight`). Each
        product is scaled after it is formed, as in PEFT. without: the adapter whose term is left out.
        """
        compute = torch.promote_types(weight.dtype, torch.float32)
        total: Tensor | None = None
        for term in self.terms:
            if term.adapter == without:
                continue
            a, b = term.factor.a.to(compute), term.factor.b.to(compute)
            delta = ((b @ a[:, rows]).T if self.transposed else b[rows] @ a).mul_(term.scale)
            total = delta if total is None else total.add_(delta)
        merged = weight if total is None else total.add_(weight)
        magnitude = self.terms[0].factor.magnitude
        if total is not None and magnitude is not None:
            merged = _with_norm(merged, magnitude.to(compute), rows, self.transposed)
        return merged.to(dtype or weight.dtype).contiguous()


def _with_norm(merged: Tensor, magnitude: Tensor, rows: slice, transposed: bool) -> Tensor:
    """Return `merged` with each output scaled to the norm in `magnitude` [out]; outputs of zeros stay zero.

    Outputs are rows, or columns where `transposed`.
    """
    inputs = 0 if transposed else 1
    # The same clamp as in training (parallel/decomposed.py).
    least = math.sqrt(torch.finfo(merged.dtype).tiny)
    norms = torch.linalg.norm(merged, dim=inputs, keepdim=True).clamp_(min=least)
    wanted = magnitude[None] if transposed else magnitude[rows, None]
    return merged.mul_(wanted / norms)


def build_updates(
    architecture: Architecture, checkpoint: Checkpoint, adapters: Sequence[tuple[Path, float, AdapterFactors]]
) -> dict[str, Update]:
    """Return stored tensor name → its update by all adapters (folder, weight, content).

    Raises UserError for factors of an adapter that do not fit the base, for a DoRA adapter among others or with a
    weight other than 1, and where all updates are zero.
    """
    _refuse_sums([(folder, weight) for folder, weight, adapter in adapters if adapter.dora], len(adapters))
    terms: dict[str, list[Term]] = {}
    for index, (folder, weight, adapter) in enumerate(adapters):
        for name, factor in _placed(architecture, checkpoint, adapter, folder).items():
            terms.setdefault(name, []).append(Term(factor, weight * factor.scale(adapter.rslora), index))
    if not any(
        term.factor.magnitude is not None or (term.scale and term.factor.a.any() and term.factor.b.any())
        for several in terms.values()
        for term in several
    ):
        folders = ", ".join(str(folder) for folder, _, _ in adapters)
        raise UserError(f"{folders}: changes nothing, because s·B·A is zero in every module (an untrained adapter?)")
    linears = architecture.linear_modules()
    stored = {architecture.find(f"{module}.weight", checkpoint) for module in linears}
    return {name: Update(tuple(several), architecture.conv1d and name in stored) for name, several in terms.items()}


def _refuse_sums(decomposed: Sequence[tuple[Path, float]], adapters: int) -> None:
    """Raise UserError for a DoRA adapter among others or with a weight other than 1: it cannot be added or scaled."""
    for folder, weight in decomposed:
        if adapters > 1 or weight != 1:
            raise UserError(
                f"{folder}: a DoRA adapter, which cannot be weighted or added to others because it scales the rows "
                "of the weights; merge it alone, with weight 1"
            )


def _placed(
    architecture: Architecture, checkpoint: Checkpoint, adapter: AdapterFactors, folder: Path
) -> dict[str, LowRankFactor]:
    modules = architecture.linear_modules()
    placed, problems = {}, []
    for module, factor in adapter.factors.items():
        name = architecture.find(f"{module}.weight", checkpoint)
        # A tied output layer shares its weight with the embedding: an update of one would change the other.
        if name is None or module not in (modules if architecture.tied else modules | {"lm_head"}):
            problems.append(f"{module} is not a linear of the base that can be updated by itself")
            continue
        shape = (factor.b.size(0), factor.a.size(1))
        stored = checkpoint.shape(name)
        if shape != (stored[::-1] if architecture.conv1d and module in modules else stored):
            problems.append(
                f"{module} has an update [out, in] = {list(shape)}, but {name} in the base is {list(stored)}"
            )
            continue
        placed[name] = factor
    if problems:
        raise UserError(
            f"{folder}: does not fit the base {checkpoint.path} ({len(problems)} faults): {'; '.join(problems[:5])}"
        )
    return placed
