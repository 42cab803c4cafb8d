"""Low-rank updates on the linears (Hu et al. 2021): the project's own method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.placement import LoraRules, place
from lowrank_dist.config import Config
from lowrank_dist.errors import UserError
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance
from lowrank_dist.formats.trained_files import Collected
from lowrank_dist.methods.lora.adopt import initial_factors
from lowrank_dist.methods.lora.files import CONFIG_FILE, WEIGHTS_FILE, Adapter, module_paths, write_adapter_files
from lowrank_dist.methods.lora.inject import inject
from lowrank_dist.methods.lora.state import adapter_factors, lora_theta, spread_factors, whole_factors
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.ops.mask import quantise
from lowrank_dist.parallel.lanes import wanted
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.theta import Theta
from lowrank_dist.parallel.topology import Topology


class Lora:
    """See methods/method.py. Raises UserError as `place` does, and for a dropout that cannot be drawn."""

    virtual = 0
    lead: tuple[int, ...] = ()
    published = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)

    def __init__(self, config: Config, architecture: Architecture) -> None:
        self._config, self._architecture = config, architecture
        lora = config.lora
        rules = LoraRules(lora.rank, lora.alpha, lora.targets, lora.rslora, lora.rank_pattern, lora.alpha_pattern)
        self._placements = place(architecture, rules)
        try:
            self._threshold = quantise(lora.dropout)
        except ValueError as error:
            raise UserError(f"lora.dropout: {error}; give a smaller one") from error

    @property
    def summary(self) -> str:
        return f"low-rank updates of rank {self._config.lora.rank} on {len(self._placements)} fused linears"

    def attach(self, model: CausalLM, topology: Topology, *, resumed: bool) -> Theta:
        config, seed = self._config, self._config.train.seed
        masks = MaskSource(seed, self._threshold)
        lanes = wanted(config.engine.lanes, next(model.parameters()).device.type)
        adapted = inject(model, self._placements, masks, seed, topology.tp_rank, topology.tp_size, lanes)
        if config.lora.init_from is not None and not resumed:
            spread_factors(adapted, topology.tp_rank, initial_factors(config, self._placements))
        return lora_theta(adapted, topology.tp_size, masks)

    def files(self, folder: Path, provenance: Provenance) -> Collected:
        def write(tensors: Mapping[str, Tensor]) -> None:
            lora, architecture = self._config.lora, self._architecture
            adapter = Adapter(
                adapter_factors(whole_factors(self._placements, tensors)),
                lora.dropout,
                lora.rslora,
                architecture.conv1d,
                str(self._config.model.path),
            )
            write_adapter_files(folder, adapter, provenance, module_paths(architecture), trained=True)

        return Collected(write)
