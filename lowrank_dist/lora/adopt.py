"""A PEFT adapter on a model of ours: the rules that give exactly its factors, and these, checked against the base."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor

from lowrank_dist.checkpoint.adapter import WEIGHTS_FILE, Adapter, module_paths
from lowrank_dist.checkpoint.fingerprint import fingerprint
from lowrank_dist.checkpoint.peft_config import describe
from lowrank_dist.checkpoint.provenance import PROVENANCE_FILE, read_provenance
from lowrank_dist.errors import UserError
from lowrank_dist.lora.placement import LinearPlacement, LoraRules
from lowrank_dist.messages import some_of
from lowrank_dist.model.architecture import Architecture


def rules_of(adapter: Adapter, architecture: Architecture) -> LoraRules:
    """Rules under which `place` gives exactly the adapter's factors, if all are on linears of the model."""
    peft = describe(
        {module: (factor.rank, factor.alpha) for module, factor in adapter.factors.items()},
        module_paths(architecture),
        dropout=adapter.dropout,
        rslora=adapter.rslora,
        fan_in_fan_out=adapter.fan_in_fan_out,
        base=adapter.base,
    )
    return LoraRules(
        peft.rank, peft.alpha, list(peft.targets), peft.rslora, dict(peft.rank_pattern), dict(peft.alpha_pattern)
    )


def refuse_foreign(folder: Path, adapter: Adapter, known: Collection[str], base: Path) -> None:
    """Raise UserError for factors of modules that are not among those `known`."""
    foreign = sorted(adapter.factors.keys() - set(known))
    if foreign:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: {some_of(foreign)} cannot be adapted in the model in {base}: give an adapter of "
            "this model's attention and MLP linears"
        )


def refuse_another_base(folder: Path, base: Path) -> None:
    """Raise UserError where lowrank_dist.json beside the adapter names a base of another fingerprint."""
    provenance = read_provenance(folder)
    if provenance is None:
        return
    digest = fingerprint(base)
    if digest != provenance.base_fingerprint:
        raise UserError(
            f"{folder / PROVENANCE_FILE}: base_fingerprint is {provenance.base_fingerprint[:12]}…, but {base} has "
            f"{digest[:12]}…: give the base that the adapter was trained on, unchanged"
        )


def factors_for(
    folder: Path, adapter: Adapter, placements: Sequence[LinearPlacement], base: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path → A [r, in] and B [out, r] in fp32, as `spread_factors` takes them.

    Raises UserError where the adapter has other modules or shapes than `placements`.
    """
    specs = {spec.path: spec for placement in placements for spec in placement.factors}
    refuse_foreign(folder, adapter, specs, base)
    lacking = sorted(specs.keys() - adapter.factors.keys())
    if lacking:
        raise UserError(f"{folder / WEIGHTS_FILE}: no factors for {some_of(lacking)}, which the targets name")
    for path, spec in specs.items():
        found = adapter.factors[path]
        expected = (spec.rank, spec.in_features), (spec.rows, spec.rank)
        if (tuple(found.a.shape), tuple(found.b.shape)) != expected:
            raise UserError(
                f"{folder / WEIGHTS_FILE}: {path} has lora_A {list(found.a.shape)} and lora_B {list(found.b.shape)}, "
                f"but the model in {base} takes {list(expected[0])} and {list(expected[1])}: give the model that the "
                "adapter was trained on"
            )
    return {path: (adapter.factors[path].a, adapter.factors[path].b) for path in specs}
