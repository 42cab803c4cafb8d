"""Prefix tuning: trained keys and values at l positions of every layer (Li & Liang 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.provenance import Provenance, refuse_another_base
from lowrank_dist.formats.trained_files import Collected
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.prefix.config import PrefixConfig
from lowrank_dist.methods.prefix.module import EMBEDDING, HIDDEN, KEYS_VALUES, OUTPUT, Prefix, keys_values
from lowrank_dist.methods.prompt_files import (
    PREFIX,
    PromptLearning,
    read_prompt_learning,
    require_fit,
    write_prompt_learning,
)
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.theta import Theta
from lowrank_dist.parallel.topology import Topology

# Of keys and values without an MLP: about what a layer's own have, whatever the model.
_SPREAD = 0.02


class PrefixTuning:
    """See methods/method.py. width: of the reparametrising MLP, which the files do not have, None for none."""

    lead: tuple[int, ...] = ()
    published = PREFIX.published

    def __init__(self, length: int, width: int | None, architecture: Architecture, base: str, seed: int) -> None:
        self.virtual, self._width = length, width
        self._architecture, self._base, self._seed = architecture, base, seed

    @property
    def summary(self) -> str:
        through = "" if self._width is None else f", through an MLP of width {self._width}"
        return f"prefix tuning: keys and values at {self.virtual} positions of every layer{through}"

    def attach(self, model: CausalLM, topology: Topology, *, resumed: bool) -> Theta:
        architecture = self._architecture
        prefix = Prefix(
            self.virtual,
            self._width,
            hidden=architecture.hidden,
            layers=architecture.layers,
            kv_heads=architecture.kv_heads,
            head_dim=architecture.head_dim,
            group=topology.tp_group,
            device=next(model.parameters()).device,
        )
        model.prefix = prefix
        theta = Theta(tuple(prefix.parameters()), prefix.shapes(), prefix.layout, MaskSource(self._seed, 0))
        theta.spread(self._initial(theta.all_shapes()), topology.tp_rank)
        return theta

    def _initial(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """As PEFT's embeddings and linears start, but for keys and values alone; the same at every layout."""
        generator = torch.Generator().manual_seed(self._seed)
        values = {}
        for name, shape in shapes.items():
            values[name] = torch.zeros(shape)
            if name == KEYS_VALUES:
                values[name].normal_(0, _SPREAD, generator=generator)
            elif name == EMBEDDING:
                values[name].normal_(generator=generator)
            elif name in (HIDDEN, OUTPUT):
                bound = 1 / math.sqrt(shape[-1])
                values[name].uniform_(-bound, bound, generator=generator)
        return values

    def files(self, folder: Path, provenance: Provenance) -> Collected:
        def write(tensors: Mapping[str, Tensor]) -> None:
            architecture = self._architecture
            learned = PromptLearning(
                PREFIX.kind,
                keys_values(tensors).flatten(1),
                architecture.layers,
                architecture.kv_heads,
                architecture.kv_heads * architecture.head_dim,
                self._base,
            )
            write_prompt_learning(folder, learned, provenance)

        return Collected(write)


def build(section: PrefixConfig, setting: Setting, architecture: Architecture) -> PrefixTuning:
    """See `method.Tuner`."""
    if reason := section.reason_without_room(setting.method, setting.max_length):
        raise UserError(reason)
    return PrefixTuning(section.length, section.width, architecture, str(setting.base), setting.seed)


def attach_trained(model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
    """See `method.Tuner`."""
    refuse_another_base(folder, base)
    found, architecture = read_prompt_learning(folder), model.architecture
    require_fit(folder, found, architecture)
    length = found.embeddings.size(0)
    theta = PrefixTuning(length, None, architecture, str(folder), 0).attach(model, topology, resumed=True)
    shape = (length, architecture.layers, 2, architecture.kv_heads, architecture.head_dim)
    theta.spread({KEYS_VALUES: found.embeddings.view(shape)}, topology.tp_rank)
