"""Low-rank updates on the linears (Hu et al. 2021), with DoRA as an option: the project's main method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.placement import LinearPlacement, place_factors
from lowrank_dist.arch.tensors import module_paths
from lowrank_dist.errors import UserError
from lowrank_dist.formats.provenance import Provenance, refuse_another_base
from lowrank_dist.methods.files import PUBLISHED, Collected
from lowrank_dist.methods.lora.adopt import factors_for, initial_factors, refuse_foreign, rules_of
from lowrank_dist.methods.lora.config import LoraConfig
from lowrank_dist.methods.lora.extras import require_copies
from lowrank_dist.methods.lora.factors import adapter_factors, inject, lora_theta, stored_tensors, whole_factors
from lowrank_dist.methods.lora.files import AdapterFactors, read_adapter, write_adapter_files
from lowrank_dist.methods.lora.footprint import placement_rules, refuse_parts
from lowrank_dist.methods.method import Setting
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.ops.mask import quantise
from lowrank_dist.parallel.decomposed import DecomposedFactors, refresh_norms, start_magnitudes
from lowrank_dist.parallel.factors import LowRankFactors
from lowrank_dist.parallel.frozen import fuses_factors
from lowrank_dist.parallel.linear import LowRankLinear
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.theta import Theta
from lowrank_dist.parallel.topology import Topology


class Lora:
    """The `Method` of low-rank updates. Raises UserError as `place_factors` does, and where dropout rounds to 1."""

    virtual_positions = 0
    virtual_token_ids: tuple[int, ...] = ()
    published = PUBLISHED

    def __init__(self, section: LoraConfig, setting: Setting, architecture: Architecture) -> None:
        self._section, self._setting, self._architecture = section, setting, architecture
        self._placements = place_factors(architecture, placement_rules(section))
        try:
            self._threshold = quantise(section.dropout)
        except ValueError as error:
            raise UserError(f"lora.dropout: {error}; give a smaller value") from error
        if section.dora:
            refuse_parts(self._placements)

    @property
    def summary(self) -> str:
        kind = "weight-decomposed low-rank" if self._section.dora else "low-rank"
        return f"{kind} updates of rank {self._section.rank} on {len(self._placements)} fused linears"

    def attach(self, model: CausalLM, topology: Topology, *, resumed: bool) -> Theta:
        setting, start = self._setting, self._section.init_from
        masks = MaskSource(setting.seed, self._threshold)
        fuse_factors = fuses_factors(setting.fuse_factors, next(model.parameters()).device.type)
        placements, dora = self._placements, self._section.dora
        theta = _attach(model, placements, topology, masks, setting.seed, fuse_factors=fuse_factors, dora=dora)
        if start is not None and not resumed:
            theta.set_from_whole(
                stored_tensors(initial_factors(start, self._placements, setting.base)), topology.coordinates
            )
        return theta

    def files(self, folder: Path, provenance: Provenance, *, trained: bool) -> Collected:
        def write(tensors: Mapping[str, Tensor]) -> None:
            lora, architecture = self._section, self._architecture
            adapter = AdapterFactors(
                adapter_factors(whole_factors(self._placements, tensors)),
                lora.dropout,
                lora.rslora,
                architecture.conv1d,
                str(self._setting.base),
            )
            write_adapter_files(folder, adapter, provenance, module_paths(architecture), trained=trained)

        return Collected(write)


def build(section: LoraConfig, setting: Setting, architecture: Architecture) -> Lora:
    """See `method.MethodBuilder`."""
    return Lora(section, setting, architecture)


def attach_trained(model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
    """See `method.MethodBuilder`."""
    refuse_another_base(folder, base)
    require_copies(folder, base)
    adapter = read_adapter(folder, model.architecture)
    refuse_foreign(folder, adapter, model.architecture.linear_modules(), base)
    placements = place_factors(model.architecture, rules_of(adapter, model.architecture))
    factors = factors_for(folder, adapter, placements, base)
    theta = _attach(model, placements, topology, MaskSource(0, 0), 0, fuse_factors=False, dora=adapter.dora)
    theta.set_from_whole(stored_tensors(factors), topology.coordinates)


def _attach(
    model: CausalLM,
    placements: Sequence[LinearPlacement],
    topology: Topology,
    masks: MaskSource,
    seed: int,
    *,
    fuse_factors: bool,
    dora: bool,
) -> Theta:
    """Attach low-rank updates with their initial values to the model. Collective with dora."""
    kind = DecomposedFactors if dora else LowRankFactors
    adapted = inject(model, placements, masks, seed, topology.tp_rank, topology.tp_size, fuse_factors, kind)
    theta = lora_theta(adapted, topology.tp_size, masks)
    if not dora:
        return theta
    linears = [module for module in model.modules() if isinstance(module, LowRankLinear) and module.update is not None]
    start_magnitudes(linears, topology.tp_group)
    return replace(theta, refresh=partial(refresh_norms, linears, topology.tp_group))
