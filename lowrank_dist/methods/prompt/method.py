"""Prompt tuning: trained embeddings at l positions before the input (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.provenance import Provenance, refuse_another_base
from lowrank_dist.formats.trained_files import Collected
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.prompt.config import PromptConfig
from lowrank_dist.methods.prompt.module import add_virtual_tokens
from lowrank_dist.methods.prompt_files import (
    PROMPT,
    PromptLearning,
    read_prompt_learning,
    require_fit,
    write_prompt_learning,
)
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.theta import Held, Theta, all_of
from lowrank_dist.parallel.topology import Topology

EMBEDDINGS = "prompt.embeddings"
_SPREAD = 0.02


class PromptTuning:
    """See methods/method.py. init: "vocabulary" (embeddings of tokens drawn by the seed) or "random"."""

    published = PROMPT.published

    def __init__(
        self, length: int, init: Literal["vocabulary", "random"], architecture: Architecture, base: str, seed: int
    ) -> None:
        self.virtual, self._init = length, init
        self.lead = tuple(range(architecture.vocab, architecture.vocab + length))
        self._architecture, self._base, self._seed = architecture, base, seed

    @property
    def summary(self) -> str:
        return f"prompt tuning: embeddings at {self.virtual} positions before every sample"

    def attach(self, model: CausalLM, topology: Topology, *, resumed: bool) -> Theta:
        rows = add_virtual_tokens(model, self._initial(model))
        shape = {EMBEDDINGS: (self.virtual, self._architecture.hidden)}
        held = [Held(shape[EMBEDDINGS], (all_of(EMBEDDINGS),))]
        return Theta((rows,), (shape,), lambda tp_rank: held, MaskSource(self._seed, 0))

    def _initial(self, model: CausalLM) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        device = next(model.parameters()).device
        if self._init == "random":
            shape = (self.virtual, self._architecture.hidden)
            return torch.empty(shape).normal_(0, _SPREAD, generator=generator).to(device)
        drawn = torch.randint(self._architecture.vocab, (self.virtual,), generator=generator)
        return model.embeddings_of(drawn.to(device)).float()

    def files(self, folder: Path, provenance: Provenance) -> Collected:
        def write(tensors: Mapping[str, Tensor]) -> None:
            architecture = self._architecture
            learned = PromptLearning(
                PROMPT.kind,
                tensors[EMBEDDINGS],
                architecture.layers,
                architecture.heads,
                architecture.hidden,
                self._base,
            )
            write_prompt_learning(folder, learned, provenance)

        return Collected(write)


def build(section: PromptConfig, setting: Setting, architecture: Architecture) -> PromptTuning:
    """See `method.Tuner`."""
    if reason := section.reason_without_room(setting.method, setting.max_length):
        raise UserError(reason)
    return PromptTuning(section.length, section.init, architecture, str(setting.base), setting.seed)


def attach_trained(model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
    """See `method.Tuner`."""
    refuse_another_base(folder, base)
    found = read_prompt_learning(folder)
    require_fit(folder, found, model.architecture)
    add_virtual_tokens(model, found.embeddings.to(next(model.parameters()).device))
